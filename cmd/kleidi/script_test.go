package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/store/kube/kubetest"
)

// binary is the built kleidi.
var binary string

// buildFlags are the flags of the build. Under the race detector, the binary is built
// with it too.
var buildFlags = []string{"build", "-ldflags", "-X github.com/beezy-dev/kleidi/internal/version.build=v0-test"}

func TestMain(m *testing.M) {
	code, err := build(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// build builds the binary that the scripts run, and runs the tests.
func build(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "kleidi-test")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "kleidi")
	out, err := exec.Command("go", append(buildFlags, "-o", binary, ".")...).CombinedOutput()
	if err != nil {
		return 1, fmt.Errorf("go build: %w\n%s", err, out)
	}
	return m.Run(), nil
}

// TestScript runs the binary in the scenes of testdata/script/*.txtar. Each script has a
// separate machine, a configuration for it, and the commands below.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                filepath.Join("testdata", "script"),
		RequireUniqueNames: true,
		Setup:              setup,
		Cmds:               commands(),
	})
}

// commands are the commands of every host, and "on", which runs one on another host.
func commands() map[string]func(*testscript.TestScript, bool, []string) {
	all := map[string]func(*testscript.TestScript, bool, []string){"on": command((*host).on)}
	for name, f := range hostCommands {
		all[name] = command(f)
	}
	return all
}

// hostCommand is a command that a script runs on a host.
type hostCommand func(*host, *testscript.TestScript, []string) error

var hostCommands = map[string]hostCommand{
	"api":       (*host).api,
	"config":    (*host).config,
	"kleidi":    (*host).kleidi,
	"machine":   (*host).machineCommand,
	"copy":      (*host).copyCommand,
	"proxy":     (*host).proxyCommand,
	"serve":     (*host).serve,
	"term":      (*host).term,
	"hup":       (*host).hup,
	"crash":     (*host).crash,
	"waitfor":   (*host).waitFor,
	"get":       (*host).get,
	"kms":       (*host).kms,
	"forge":     (*host).forge,
	"readback":  (*host).readBack,
	"again":     (*host).again,
	"trust":     (*host).trust,
	"impostor":  (*host).impostor,
	"hog":       (*host).hog,
	"flood":     (*host).flood,
	"footprint": (*host).footprint,
	"ask":       (*host).ask,
	"listening": func(h *host, _ *testscript.TestScript, args []string) error { return h.listening(args[0]) },
	"pkfp":      (*host).pkfp,
	"slot":      (*host).slotName,
	"row":       (*host).row,
	"snapshot":  (*host).snapshot,
	"etcd":      (*host).etcdCommand,
	"exits":     (*host).exits,
	"retired":   (*host).retired,
	"table":     (*host).printTable,
	"approve":   (*host).approve,
	"join":      (*host).join,
	"doctor":    (*host).doctorCommand,
}

// command turns a method into a script command. An error is a failure, which "!" expects.
func command(f func(h *host, ts *testscript.TestScript, args []string) error) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		err := f(ts.Value("host").(*host), ts, args)
		var broken *brokenError
		switch {
		case errors.As(err, &broken):
			ts.Fatalf("%v", err)
		case err == nil && neg:
			ts.Fatalf("it succeeded")
		case err != nil && !neg:
			ts.Fatalf("%v", err)
		}
	}
}

// brokenError is a failure even if the script expects one.
type brokenError struct{ err error }

func (e *brokenError) Error() string { return e.err.Error() }

func broken(format string, args ...any) error { return &brokenError{fmt.Errorf(format, args...)} }

// host is the machine of a script, with the processes on it.
type host struct {
	t       testing.TB
	work    string
	address string // of health and metrics
	hardware
	server *process
	first  *process // the first serve, while a second one runs
	sealed map[string]sealedSeed
	copies map[string][]int // the slots of a kept copy of a keyring that opened
	table  []tableRow
	name   string           // in the keyring
	others map[string]*host // by that name

	held    *grpc.ClientConn // of a second provider
	cluster *kubetest.API
	etcd    *usagetest.Etcd

	stopHog func()
	before  [2]int // the footprint of serve: KiB and files
}

var hosts atomic.Uint32

// loopback returns a loopback address that no other host of this test has, so that no
// host needs a free port.
func loopback() string {
	return fmt.Sprintf("127.%d.%d.%d:9779", 64+os.Getpid()%64, os.Getpid()/64%256, hosts.Add(1)%254+1)
}

func setup(env *testscript.Env) error {
	h := &host{t: env.T().(testing.TB), work: env.WorkDir, name: "cp-1", sealed: map[string]sealedSeed{}, copies: map[string][]int{}, others: map[string]*host{}}
	h.address = loopback()
	env.Setenv("HTTP", h.address)
	env.Setenv("SECOND", strings.Replace(h.address, ":9779", ":9780", 1))
	env.Setenv("THIRD", strings.Replace(h.address, ":9779", ":9781", 1))
	env.Values["host"] = h
	for _, dir := range []string{"run", "hw"} {
		if err := os.Mkdir(h.path(dir), 0o700); err != nil {
			return err
		}
	}
	recipient, err := h.makeIdentity("identity.txt")
	if err != nil {
		return err
	}
	env.Setenv("RECIPIENT", recipient)
	env.Setenv("KEYRING", h.path("state/keyring.json"))
	memory, err := os.MkdirTemp("/dev/shm", "kleidi") // never on a disk
	if err != nil {
		return err
	}
	env.Setenv("MEMORY", memory)
	env.Defer(func() { _ = os.RemoveAll(memory) })
	env.Setenv("ANCHOR", h.path("state/anchor.json"))
	env.Setenv("GORACE", os.Getenv("GORACE"))
	env.Setenv("PATH", filepath.Dir(binary)+string(filepath.ListSeparator)+env.Getenv("PATH"))
	env.Defer(func() { h.end(env.T().Fatal) })
	return h.config(nil, nil)
}

func (h *host) path(name string) string { return filepath.Join(h.work, name) }

func (h *host) makeIdentity(name string) (string, error) {
	identity, recipient, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		return "", err
	}
	defer identity.Close()
	identity.With(func(b []byte) { err = os.WriteFile(h.path(name), b, 0o600) })
	return recipient, err
}

// end checks at the end of every script that the process did not die, and that its log
// holds no identity.
func (h *host) end(fatal func(...any)) {
	for _, other := range h.others {
		other.end(fatal)
	}
	for _, p := range []*process{h.first, h.server} {
		if p == nil {
			continue
		}
		p.kill()
		if log := p.log.String(); regexp.MustCompile(`DATA RACE|\bpanic\b|goroutine \d|AGE-SECRET-KEY-\S{20}`).MatchString(log) {
			fatal("the log of serve holds a panic or an identity:\n" + log)
		}
	}
}

// config writes the configuration: config KEY.KEY=YAML...
func (h *host) config(_ *testscript.TestScript, args []string) error {
	doc := map[string]any{
		"apiVersion": config.APIVersion, "kind": config.Kind, "node": h.name,
		"state": map[string]any{"dir": h.path("state")},
		"tpm": map[string]any{"device": "unix:" + h.path("hw/tpm.sock"), "timeout": "1m",
			"eventLog": h.path("hw/log"), "userspaceEventLog": h.path("hw/userspace")},
		"kms":   map[string]any{"socket": h.path("run/kms.sock")},
		"admin": map[string]any{"socket": h.path("run/admin.sock")},
		"http":  map[string]any{"socket": h.path("run/http.sock"), "address": h.address},
	}
	for _, arg := range args {
		path, text, ok := strings.Cut(arg, "=")
		if !ok {
			return broken("config: %q; want KEY.KEY=YAML", arg)
		}
		var value any
		if err := yaml.Unmarshal([]byte(text), &value); err != nil {
			return broken("config: %w", err)
		}
		at := doc
		keys := strings.Split(path, ".")
		for _, k := range keys[:len(keys)-1] {
			if at[k] == nil {
				at[k] = map[string]any{}
			}
			at = at[k].(map[string]any)
		}
		at[keys[len(keys)-1]] = value
	}
	b, err := yaml.Marshal(doc)
	if err != nil {
		return err
	}
	h.address, _ = doc["http"].(map[string]any)["address"].(string)
	return os.WriteFile(h.path("config.yaml"), b, 0o600)
}

// kleidi runs the binary with this host's configuration. A failure has exit code
// 1 and an "error:" that is one message in the house style.
func (h *host) kleidi(ts *testscript.TestScript, args []string) error {
	err := ts.Exec(binary, append([]string{"--config", h.path("config.yaml")}, args...)...)
	if wrong := checkJSON(args, ts.ReadFile("stdout")); wrong != nil {
		return &brokenError{wrong}
	}
	if err == nil {
		return nil
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if ok && args[0] == "status" && (exit.ExitCode() == exitLocked || exit.ExitCode() == exitProblem) {
		return nil // a verdict, not a failure
	}
	if ok && (args[0] == "rotate" || args[0] == "node") && exit.ExitCode() == exitWaiting && strings.Contains(ts.ReadFile("stdout"), "aiting") {
		return err
	}
	if !ok || exit.ExitCode() != 1 {
		return broken("kleidi ends in %w, not with exit code 1", err)
	}
	if e := style(ts.ReadFile("stderr")); e != nil {
		return &brokenError{e}
	}
	return err
}

// style checks that a message follows the house style: lower case, no full stop.
func style(stderr string) error {
	_, message, ok := strings.Cut("\n"+stderr, "\nerror: ")
	message = strings.TrimSpace(message)
	switch {
	case !ok || message == "":
		return fmt.Errorf("no error is shown in %q", stderr)
	case strings.HasSuffix(message, "."):
		return fmt.Errorf("the message ends in a full stop: %s", message)
	case regexp.MustCompile(`^[A-Z][a-z]`).MatchString(message):
		return fmt.Errorf("the message begins in upper case: %s", message)
	}
	return nil
}

// waitTimeout bounds the wait for a condition.
const waitTimeout = 3 * time.Minute

// eventually waits until ready returns nil, and returns its error if it does not.
func eventually(ready func() error) error {
	timeout := time.NewTimer(waitTimeout)
	defer timeout.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if _, ok := errors.AsType[*brokenError](err); err == nil || ok {
			return err
		}
		select {
		case <-timeout.C:
			return broken("not within %v: %w", waitTimeout, err)
		case <-tick.C:
		}
	}
}

// whileBusy repeats f while it fails in a way that a busy machine may cause.
func whileBusy(busy func(said string) bool, f func() error) (err error) {
	late := eventually(func() error {
		if err = f(); err != nil && busy(err.Error()) {
			return err
		}
		return nil
	})
	return cmp.Or(late, err)
}

// again checks that a file still equals its copy, so that nothing has overwritten it.
func (h *host) again(_ *testscript.TestScript, args []string) error {
	if len(args) != 2 {
		return broken("again FILE COPY")
	}
	a, err := os.ReadFile(h.abs(args[0]))
	if err != nil {
		return err
	}
	b, err := os.ReadFile(h.abs(args[1]))
	if err != nil {
		return err
	}
	if !bytes.Equal(a, b) {
		return fmt.Errorf("%s is not what it was", args[0])
	}
	return nil
}

func (h *host) abs(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return h.path(name)
}
