package bundle

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/internal/files"
)

// WriteFile writes a new file, with the versions of this machine and the lines of its journal.
func WriteFile(ctx context.Context, path string, n *doctor.Node, r diagnosis.Report) error {
	var b bytes.Buffer
	if err := Write(&b, n, r, journal(ctx), versions(n)); err != nil {
		return err
	}
	return files.HintRoot(files.WriteNew(path, b.Bytes()))
}

func versions(n *doctor.Node) map[string]string {
	all := map[string]string{"kleidi": n.Version, "serve": n.Status.Version, "go": runtime.Version(), "arch": runtime.GOARCH}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		all["kernel"] = strings.TrimSpace(string(b))
	}
	b, _ := os.ReadFile("/etc/os-release") // a container may have none
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			all["system"] = strings.Trim(strings.TrimSpace(name), `"`)
		}
	}
	if n.API.Value != nil {
		all["kube-apiserver"] = n.API.Value.Version
	}
	return all
}

// patience is how long journalctl may take.
const patience = 10 * time.Second

// journal returns the unit's last lines, or nothing if there is no journal.
func journal(ctx context.Context) []byte {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "journalctl", "--unit=kleidi", "--lines=1000", "--output=cat", "--no-pager").Output()
	if err != nil {
		return nil
	}
	return out
}
