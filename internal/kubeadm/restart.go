package kubeadm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
)

const (
	lookEvery  = 500 * time.Millisecond
	askTimeout = 10 * time.Second
	maxAnswer  = 64 << 10

	maxCommandLine = 2 << 20 // Linux' own limit, by default

	// refusedFor is how long a kube-apiserver must refuse to say whether it is ready before
	// it counts as ready. One without anonymous requests refuses for good. Any other answers
	// 403 until it has read its roles, for 2 seconds on a quiet machine.
	refusedFor = time.Minute
)

// Restart watches kubelet restart kube-apiserver. kubelet acts some time after a manifest
// has changed, and until then the former kube-apiserver still writes objects as before.
type Restart struct {
	// Say shows a person what is waited for.
	Say func(message string)

	proc     string
	former   map[string][]string  // the processes before the change
	refused  map[string]time.Time // when a process first refused the question
	patience time.Duration        // refusedFor
}

// ApplyAndAwait changes the manifest, and waits until a kube-apiserver with the change is
// ready, even if an earlier call made the change. It says what it waits for. The change stays
// if the error says that the wait has ended without a kube-apiserver that is ready.
func (p Patch) ApplyAndAwait(ctx context.Context, manifest string, timeout time.Duration, say func(message string)) (changed bool, err error) {
	restart := BeforeRestart(say)
	if changed, err = p.ApplyFile(manifest); err != nil {
		return changed, err
	}
	if !changed {
		restart.Unchanged()
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return changed, restart.Await(ctx, p.EncryptionConfig)
}

// BeforeRestart remembers the kube-apiservers that run now, whose manifest is to change.
func BeforeRestart(say func(message string)) *Restart {
	return &Restart{Say: say, proc: "/proc", former: processes("/proc"), refused: map[string]time.Time{}, patience: refusedFor}
}

// Unchanged says that the manifest did not change, so that a process from before counts.
func (r *Restart) Unchanged() { r.former = nil }

// Await returns when a kube-apiserver with the EncryptionConfiguration runs and is ready.
func (r *Restart) Await(ctx context.Context, file string) error {
	for last := ""; ; {
		missing := r.missing(ctx, file)
		if missing == "" {
			return nil
		}
		if missing != last && ctx.Err() == nil {
			r.Say(missing)
			last = missing
		}
		select {
		case <-ctx.Done():
			return seal.Errorf("", "look at journalctl -u kubelet and at kube-apiserver's log in /var/log/pods, and at kleidi status; the same command then waits again",
				"the manifest has the change, but %s", cmp.Or(last, missing))
		case <-time.After(lookEvery):
		}
	}
}

// missing says what kube-apiserver still lacks, or nothing.
func (r *Restart) missing(ctx context.Context, file string) string {
	now, unready := processes(r.proc), ""
	for _, process := range slices.Sorted(maps.Keys(now)) {
		if _, before := r.former[process]; before || flagOf(now[process], flagName) != file {
			continue
		}
		if err := r.ready(ctx, process, now[process]); err != nil {
			unready = cmp.Or(unready, fmt.Sprintf("kube-apiserver is not ready: %v", err))
			continue // another cluster's may run here too, as with kind
		}
		return ""
	}
	return cmp.Or(unready, "kubelet has not started kube-apiserver with "+flagName+"="+file+" yet")
}

// processes returns the command lines of the running kube-apiservers.
func processes(proc string) map[string][]string {
	all := map[string][]string{}
	paths, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "cmdline"))
	for _, path := range paths {
		b, err := files.Read(path, maxCommandLine)
		if err != nil {
			continue // it has ended
		}
		words := strings.Split(string(bytes.TrimRight(b, "\x00")), "\x00")
		if filepath.Base(words[0]) == "kube-apiserver" {
			all[filepath.Base(filepath.Dir(path))] = words
		}
	}
	return all
}

// flagOf returns the value of a flag, in its own word or after the flag. The last counts.
func flagOf(words []string, name string) (value string) {
	for i, word := range words {
		if v, ok := strings.CutPrefix(word, name+"="); ok {
			value = v
		} else if word == name && i+1 < len(words) {
			value = words[i+1]
		}
	}
	return value
}

// errRefused is a kube-apiserver's answer to a question without credentials.
var errRefused = errors.New("/readyz is refused without credentials")

// ready returns nil if the process is ready, or has refused to say so for r.patience.
func (r *Restart) ready(ctx context.Context, process string, words []string) error {
	err := askReady(ctx, words)
	if !errors.Is(err, errRefused) {
		delete(r.refused, process)
		return err
	}
	if _, before := r.refused[process]; !before {
		r.refused[process] = time.Now()
	}
	if time.Since(r.refused[process]) >= r.patience {
		return nil
	}
	return fmt.Errorf("%w; if that lasts %v, it counts as ready", err, r.patience)
}

// askReady asks the kube-apiserver with this command line, as kubelet's probe does: without
// credentials, and without a look at its certificate, which may be for other names. An
// impostor could end the wait, and no more. It returns errRefused for the answers 401 and 403.
func askReady(ctx context.Context, words []string) error {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	client := &http.Client{Transport: transport, Timeout: askTimeout}
	address := net.JoinHostPort(cmp.Or(flagOf(words, "--advertise-address"), "127.0.0.1"), cmp.Or(flagOf(words, "--secure-port"), "6443"))
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/readyz", nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusOK:
		return nil
	case http.StatusUnauthorized, http.StatusForbidden:
		return errRefused
	}
	body, _ := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	for line := range strings.Lines(string(body)) {
		if failed, ok := strings.CutPrefix(line, "[-]"); ok {
			return fmt.Errorf("/readyz: %s", seal.OneLine(strings.TrimSpace(failed), 100))
		}
	}
	return fmt.Errorf("/readyz answers %d", answer.StatusCode)
}
