package verifierd

import (
	"encoding/json"
	"errors"
	"os"
	"sync"

	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/internal/files"
)

// auditFile is where verdicts go, one JSON object a line. It is opened for each,
// so that it may be moved away at any time.
type auditFile struct {
	path string
	mu   sync.Mutex
}

func (f *auditFile) record(verdicts ...*verifier.Verdict) error {
	var lines []byte
	for _, v := range verdicts {
		line, err := json.Marshal(v)
		if err != nil {
			return err
		}
		lines = append(append(lines, line...), '\n')
	}
	return f.append(lines)
}

// append returns once the lines are on the disk. Where they do not fit they are taken back.
func (f *auditFile) append(lines []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if _, err := file.Write(lines); err != nil {
		return errors.Join(err, file.Truncate(info.Size()))
	}
	return errors.Join(file.Sync(), files.SyncFolder(f.path))
}
