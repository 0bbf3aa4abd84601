package leaks

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestNothingIsSaid runs all verbs, a hostile TPM, hostile clients and operators'
// mistakes at debug level.
func TestNothingIsSaid(t *testing.T) {
	t.Parallel()
	l := begin(t)
	l.run("keyring", "verify")
	l.run("rotate") // without a serve
	l.know("rotated by the command")
	l.start()
	l.waitOpen()
	if err := l.seed("of the first serve"); err != nil {
		t.Fatal(err)
	}
	l.look()
	l.run("rotate")
	l.know("rotated by serve")
	l.run("reseal")
	if err := l.seed("after rotate"); err != nil {
		t.Fatal(err)
	}
	l.hostileClients()
	l.mistakes()
	l.hostileTPM()
	l.run("rotate")
	l.run("keyring", "restore", "--previous")
	l.know("restored")
	_ = l.stop(syscall.SIGTERM)
	other := simboot.Baseline(simboot.UKI)
	other.Kernel = "6.13.1"
	l.Reboot(other)
	l.start()
	l.eventually("serve is locked", func() error {
		_, body, err := l.get("/readyz")
		if err == nil && !strings.Contains(string(body), "boot-state") {
			err = errors.New(string(body))
		}
		return err
	})
	if err := l.try("status", "-o", "json"); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("kleidi status while locked: %v", err)
	}
	l.run("recover", "--identity-file", l.path("recovery.txt"))
	l.know("recovered")
	l.waitOpen()
	if err := l.seed("after recover"); err != nil {
		t.Fatal(err)
	}
	l.look()
	_ = l.stop(syscall.SIGQUIT) // the runtime prints all stacks
	if !bytes.Contains(l.log(), []byte("goroutine ")) {
		t.Error("serve printed no stacks")
	}
	l.silent()
}

// hostileClients sends non-gRPC data and malformed gRPC to the KMS socket.
func (l *life) hostileClients() {
	l.t.Helper()
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	settings := "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	for _, b := range []string{"GET / HTTP/1.1\r\n\r\n", preface + strings.Repeat("\xff", 4096), preface + settings + strings.Repeat("\x00", 512),
		preface + settings + "\x00\x00\x04\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff"} {
		conn, err := net.Dial("unix", l.path("kms.sock"))
		if err != nil {
			l.t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = conn.Write([]byte(b)) // the connection may be cut off at once
		_ = conn.(*net.UnixConn).CloseWrite()
		var answer bytes.Buffer
		_, _ = answer.ReadFrom(conn)
		l.said.Write(answer.Bytes())
		conn.Close()
	}
	if err := l.seed("after hostile clients"); err != nil {
		l.t.Error(err)
	}
}

// mistakes passes the identity where it does not belong, or in a bad form.
func (l *life) mistakes() {
	l.t.Helper()
	identity := quoted(l.t, []byte(l.identity))
	l.admin("recover", []byte(fmt.Sprintf(`{"identity":%s,"unknown":1}`, identity)))
	l.admin("recover", []byte(fmt.Sprintf(`{"identity":%s,"identity":%s}`, identity, identity)))
	l.admin("recover", []byte(fmt.Sprintf(`{"identity":%s`, identity)))
	l.admin("recover", []byte(fmt.Sprintf(`{"identity":%q}`, l.identity)))
	l.admin("rotate", []byte(fmt.Sprintf(`{"identity":%s}`, identity)))
	l.admin("recover", []byte(fmt.Sprintf(`{"identity":%s}`, quoted(l.t, []byte(l.identity+l.identity)))))
	l.admin("recover", []byte(fmt.Sprintf(`{"identity":%s}`, quoted(l.t, []byte(l.identity[:len(l.identity)-1]+"Q")))))
	l.admin("recover", []byte(fmt.Sprintf(`{"identity":%s,"trustKeyID":"k1-other"}`, identity)))
	l.admin("restore", []byte(fmt.Sprintf(`{"identity":%s,"keyring":%s}`, identity, identity)))
	l.write("bad.txt", "x"+l.identity+"\n"+l.identity+"\n")
	for _, args := range [][]string{
		{"recover", "--identity-file", l.path("bad.txt")},
		{"keyring", "restore", l.path("recovery.txt")},
		{"keyring", "restore", "--previous", "--identity-file", l.path("bad.txt")},
	} {
		if l.try(args...) == nil {
			l.t.Errorf("%v succeeds", args)
		}
	}
}

// hostileTPM gives answers that no TPM gives, to each command of serve in turn. None of
// the answers holds the KEK: a TPM that has the KEK could tell anybody.
func (l *life) hostileTPM() {
	l.t.Helper()
	l.proxy.Forget()
	l.admin("verify", []byte("{}"))
	commands := map[tpm2.TPMCC]bool{}
	for _, e := range l.proxy.Traffic() {
		commands[e.Code] = true
	}
	for _, code := range slices.Sorted(maps.Keys(commands)) {
		for _, bad := range tpmtest.Garbage() {
			l.proxy.Inject(tpmtest.Fault{On: code, Do: tpmtest.Raw(bad.Answer)})
			l.admin("verify", []byte("{}"))
		}
	}
	for _, code := range []tpm2.TPMCC{tpm2.TPMCCCreate, tpm2.TPMCCUnseal} {
		for _, cut := range []int{11, 20, 40} {
			l.proxy.Inject(tpmtest.Fault{On: code, Do: tpmtest.Truncate(cut)})
			l.admin("rotate", []byte("{}"))
			l.admin("recover", []byte(fmt.Sprintf(`{"identity":%s}`, quoted(l.t, []byte(l.identity)))))
		}
	}
	l.proxy.Heal()
	l.admin("reload", []byte("{}"))
	if err := l.seed("after a hostile TPM"); err != nil {
		l.t.Error(err)
	}
}

// soon bounds the time until the last goroutines of a verb end.
const soon = 3 * time.Minute

// TestMemory searches the memory of a running serve after each verb that handles
// a KEK or the identity.
func TestMemory(t *testing.T) {
	t.Parallel()
	l := begin(t)
	l.start()
	l.waitOpen()
	l.forgotten("unlock")
	l.run("rotate")
	l.know("rotated")
	l.forgotten("rotate")
	l.run("reseal")
	l.forgotten("reseal")
	l.run("recover", "--identity-file", l.path("recovery.txt"))
	l.know("recovered")
	l.forgotten("recover")
	l.run("keyring", "restore", "--previous", "--identity-file", l.path("recovery.txt"))
	l.know("restored")
	l.forgotten("restore")
	l.run("keyring", "verify")
	l.forgotten("verify")
}

// forgotten waits until no copy of any secret is left. Meanwhile it sends serve no
// request that would make serve collect garbage or overwrite memory.
func (l *life) forgotten(verb string) {
	l.t.Helper()
	var found []string
	for deadline := time.Now().Add(soon); ; {
		late := time.Now().After(deadline) // before the search, which takes long on a busy machine
		if found = l.secrets.memory(l.t, l.serve.Process.Pid); len(found) == 0 {
			return
		}
		if late {
			l.t.Errorf("after %s the memory of serve holds\n%s", verb, strings.Join(found, "\n"))
			return
		}
	}
}

// TestMemoryIsSearched: the search finds a secret that a process does hold.
func TestMemoryIsSearched(t *testing.T) {
	held := bytes.Repeat([]byte("leak"), 8)
	var s secrets
	s.add("held", held)
	if len(s.memory(t, os.Getpid())) == 0 {
		t.Error("a secret on this process's heap is not found")
	}
	for _, form := range []string{"6c65616b6c65616b6c65616b6c65616b6c65616b6c65616b6c65616b6c65616b", "xbGVha2xlYWtsZWFrbGVha2xlYWtsZWFrbGVha2xlYWs="} {
		if len(s.in([]byte(form))) == 0 {
			t.Errorf("%s is not found", form)
		}
	}
}
