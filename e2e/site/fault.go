package site

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal"
)

// Fault is a row of the fault matrix: the fault, the expected messages, and the repair.
type Fault struct {
	Name string
	// Cause is the reason why a starting kleidi is locked. Says are parts of the expected
	// text: the fault, and what to do next.
	Cause seal.Cause
	Says  []string
	// Wraps and Opens say which operations fail.
	Wraps, Opens bool
	// Break causes the fault, Mend repairs it. If Each is set, Break is called before
	// each operation, for a fault in the middle of the operation.
	Break, Mend func()
	Each        bool
	// While, if set, is called during the fault, in an open kleidi and in a locked one.
	While func(open bool)
}

// line is the result of a row.
type line struct{ name, shown, kept, recovered string }

// Matrix runs rows, and logs their results as a table. type_ is the type of the slot.
func (s *Site) Matrix(type_ string, rows []Fault) {
	s.t.Helper()
	each(s, "fault matrix of "+type_, rows, func(row Fault) (string, func() line) {
		return row.Name, func() line { return s.run(row, type_) }
	})
}

// each runs rows as separate tests, and logs the table of their results.
func each[Row any](s *Site, title string, rows []Row, of func(Row) (name string, run func() line)) {
	s.t.Helper()
	var lines []line
	for _, row := range rows {
		name, run := of(row)
		if !s.t.Run(name, func(t *testing.T) {
			s.In(t, func() { lines = append(lines, run()) })
		}) {
			break // the next row would start from the state that this one left
		}
	}
	s.table(title, lines)
}

// table logs the results of rows.
func (s *Site) table(title string, lines []line) {
	s.t.Helper()
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "FAULT\tSHOWN\tKEPT\tRECOVERED")
	for _, l := range lines {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", l.name, l.shown, l.kept, l.recovered)
	}
	_ = table.Flush() // writes into memory
	s.t.Logf("%s:\n%s", title, b.String())
}

// line returns the result of a row that was repaired at that time.
func (s *Site) line(name, shown, kept string, mended time.Time) line {
	l := line{name, shown, kept, fmt.Sprintf("by itself, in %s", time.Since(mended).Round(time.Second))}
	if s.t.Failed() {
		l.kept, l.recovered = "FAILED", "FAILED"
	}
	return l
}

// run tests a row: an open kleidi goes on and reports the fault; a rotation changes
// nothing; a kleidi that starts is locked, says why everywhere, and opens without help
// after the repair.
func (s *Site) run(row Fault, type_ string) line {
	s.t.Helper()
	before := s.Stored()
	shown := "-"
	row.Break()
	if row.Wraps {
		s.Refuse("rotate", append([]string{"wrap the new KEK for the " + type_ + " slot"}, row.Says...)...)
		shown = "rotate: " + row.Says[0]
	}
	row.again()
	if row.Opens {
		s.Refuse("slot test", append([]string{"DOES NOT OPEN"}, row.Says...)...)
	}
	s.WaitSays(http.StatusOK, "ok")
	s.Decrypts()
	if row.While != nil {
		row.While(true)
	}
	row.again()
	s.Restart()
	if row.Opens {
		shown = s.isLocked(row)
		if row.While != nil {
			row.While(false)
		}
	}
	if !bytes.Equal(before, s.Stored()) {
		s.t.Error("the keyring was changed")
	}
	row.Mend()
	began := time.Now()
	s.WaitSays(http.StatusOK, "ok")
	s.Decrypts()
	s.Do("slot test", "opens")
	s.Do("rotate")
	s.Decrypts()
	return s.line(row.Name, shown, "keyring unchanged, open goes on", began)
}

func (row Fault) again() {
	if row.Each {
		row.Break()
	}
}

// shownOf bounds the part of an error in a table, in bytes.
const shownOf = 160

// isLocked demands that kleidi reports everywhere that it is locked, and why. It returns
// the beginning of the text.
func (s *Site) isLocked(row Fault) string {
	s.t.Helper()
	locked := "locked: " + string(row.Cause)
	body := s.WaitSays(http.StatusServiceUnavailable, append([]string{locked}, row.Says...)...)
	s.Do("status --quick", append([]string{"locked"}, row.Says...)...)
	s.RefusesCalls(append([]string{string(row.Cause)}, row.Says...)...)
	node.Eventually(s.t, notices, "the log says why", func() error {
		for l := range strings.Lines(s.Log()) {
			if strings.Contains(l, "msg=locked cause="+string(row.Cause)) && strings.Contains(l, quoted(row.Says[0])) {
				return nil
			}
		}
		return fmt.Errorf("it has no line of msg=locked with cause %s and %q", row.Cause, row.Says[0])
	})
	body = strings.TrimPrefix(body, "locked: ")
	return strings.TrimSpace(body[:min(len(body), shownOf)])
}

// quoted is text as it appears inside a quoted value of the log.
func quoted(text string) string {
	q := fmt.Sprintf("%q", text)
	return q[1 : len(q)-1]
}

// RefusesCalls demands that kube-apiserver's calls end in errors that contain these
// texts.
func (s *Site) RefusesCalls(says ...string) {
	s.t.Helper()
	c, ctx := s.Client(), s.t.Context()
	_, statusErr := c.Status(ctx, &kmsapi.StatusRequest{})
	_, encryptErr := c.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: "2", Plaintext: Seed})
	_, decryptErr := c.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: "3", Ciphertext: s.seed.Ciphertext, KeyId: s.seed.KeyId})
	for call, err := range map[string]error{"Status": statusErr, "Encrypt": encryptErr, "Decrypt": decryptErr} {
		if status.Code(err) != codes.Unavailable {
			s.t.Errorf("%s: %v, want %s", call, err, codes.Unavailable)
			continue
		}
		s.WantIn("the error of "+call, err.Error(), says...)
	}
}
