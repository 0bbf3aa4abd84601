// Package bundle writes doctor's facts into a file for a bug report, without any secret.
//
// Everything in the file is on a list of facts that may be shown; nothing is there merely
// because a list of secrets lacks it. A text that another program wrote, such as a
// server's answer or a line of a configuration, is never copied. The file holds only the
// cause that kleidi gave it.
package bundle

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/seal"
)

// Write writes a tar.gz. The journal may be nil.
func Write(w io.Writer, n *doctor.Node, r diagnosis.Report, journal []byte, versions map[string]string) error {
	zip := gzip.NewWriter(w)
	archive := tar.NewWriter(zip)
	for _, f := range []struct {
		name  string
		value any
	}{
		{"doctor.json", shownFindings(r)}, {"status.json", shownStatus(n)}, {"config.json", shownConfig(n.Config)},
		{"versions.json", versions}, {"event-log.json", n.Digests}, {"journal.txt", journalLines(journal)},
	} {
		b, ok := f.value.([]byte)
		if !ok {
			var err error
			if b, err = json.MarshalIndent(f.value, "", "  "); err != nil {
				return err
			}
		}
		if err := archive.WriteHeader(&tar.Header{Name: "kleidi-doctor/" + f.name, Mode: 0o600, Size: int64(len(b)), ModTime: n.Now}); err != nil {
			return err
		}
		if _, err := archive.Write(b); err != nil {
			return err
		}
	}
	return errors.Join(archive.Close(), zip.Close())
}

// quotesNothing are the kinds of findings whose words are kleidi's own, with paths, modes
// and numbers. Of any other kind, the file holds only the name.
var quotesNothing = []string{
	"tpm/missing", "tpm/version-1.2", "tpm/lockout", "tpm/wrong-authorizations", "owner-authorization/empty", "event-log/missing", "pcrs/open", "pcrs/unmeasured", "phase/other",
	"folders/missing", "files/readable", "files/writable", "files/missing", "disk/full", "unit/overridden", "unit/not-enabled", "serve/stopped", "serve/no-socket", "version/restart",
	"recovery/missing", "memory/unlocked", "memory/process", "memory/swap", "memory/core", "root/unverified", "sockets/uid", "sockets/folder",
	"encryption-configuration/missing", "encryption-configuration/not-first", "encryption-configuration/store", "encryption-configuration/identity", "encryption-configuration/mode",
	"manifest/unpatched", "kube-apiserver/never-called", "kube-apiserver/stale", "kube-apiserver/key-ids", "clock/unsynchronised",
	"hooks/missing", "hooks/not-executable", "hooks/not-called", "next-boot/unprepared", "leftovers/rotation",
}

type finding struct {
	ID   string `json:"id"`
	Note bool   `json:"note"`
	What string `json:"what,omitempty"`
}

func shownFindings(r diagnosis.Report) any {
	all, unchecked := []finding{}, []string{}
	for _, f := range r.Findings {
		shown := finding{ID: f.ID, Note: f.Note}
		if slices.Contains(quotesNothing, f.ID) {
			shown.What = f.What
		}
		all = append(all, shown)
	}
	for _, u := range r.NotChecked {
		unchecked = append(unchecked, u.Check)
	}
	return map[string]any{"findings": all, "notChecked": unchecked}
}

func shownStatus(n *doctor.Node) any {
	s := n.Status
	type slot struct {
		Name, Type, Use string
		Opens           *bool
		Cause           seal.Cause
	}
	slots := []slot{}
	for _, r := range s.Slots {
		slots = append(slots, slot{r.Name, r.Type, r.Use, r.Opens, cause(r.Problem)})
	}
	shown := map[string]any{
		"serving": n.Serving, "state": s.State, "since": s.Since, "cause": cause(s.Problem), "fallback": cause(s.Fallback), "clusterID": s.ClusterID, "revision": s.Revision,
		"keys": s.Keys, "slots": slots, "unrevoked": len(s.Unrevoked), "changedOutside": len(s.ChangedOutside), "suspended": s.Suspension != nil, "memory": s.Memory,
	}
	if a := s.Attestation; a != nil {
		shown["attestation"] = map[string]any{"passed": a.Passed, "boot": a.Boot, "bank": a.Bank, "pcrs": a.PCRs, "cause": cause(a.Problem)}
	}
	if c := s.Cluster; c != nil {
		shown["cluster"] = map[string]any{"inStep": c.InStep, "revision": c.Revision, "cause": cause(c.Problem), "behind": len(c.Behind)}
	}
	return shown
}

// cause returns the cause of a problem, if it is one that kleidi knows.
func cause(p *admin.Problem) seal.Cause {
	switch {
	case p == nil:
		return ""
	case slices.Contains(seal.Causes(), p.Cause):
		return p.Cause
	}
	return "other"
}

// shownConfig shows choices and numbers. Of paths, addresses and names it shows only
// whether they are set: a URI may contain a PIN, and an address a password.
func shownConfig(c *config.Config) any {
	if c == nil {
		return nil
	}
	return map[string]any{
		"tpm.timeout": c.TPM.Timeout.String(), "tpm.bank": c.TPM.Bank, "tpm.pcrs": c.TPM.PCRs, "tpm.anySignedBoot": c.TPM.AnySignedBoot, "tpm.epochIndex": c.TPM.EpochIndex, "tpm.phase": c.TPM.Phase,
		"tpm.ownerAuthFile": c.TPM.OwnerAuthFile != "", "tpm.bootPolicy": c.TPM.BootPolicy != "", "tpm.verifier": c.TPM.Verifier.Address != "",
		"anchor.store": c.Anchor.Store, "anchor.index": c.Anchor.Index, "anchor.pcrs": c.Anchor.PCRs,
		"unlock.order": c.Unlock.Order, "unlock.requireAttestation": c.Unlock.RequireAttestation, "unlock.selfTest": c.Unlock.SelfTest.String(),
		"pkcs11": c.PKCS11.Configured(), "vault": c.Vault.Address != "", "vault.auth.method": c.Vault.Auth.Method, "kmsPlugin": c.KMSPlugin.Socket != "",
		"memory.lock": c.Memory.Lock, "kms.socketMode": c.KMS.SocketMode, "kms.socketUID": c.KMS.SocketUID, "kms.socketGID": c.KMS.SocketGID, "kms.allowedUIDs": c.KMS.AllowedUIDs,
		"http.address": c.HTTP.Address != "", "join": c.Join.Listen != "", "cluster": c.Cluster.Kubeconfig != "", "log.format": c.Log.Format,
	}
}

var (
	logLine  = regexp.MustCompile(`^time=(\S+) level=(DEBUG|INFO|WARN|ERROR) msg=("(?:[^"\\]|\\.)*"|\S+)`)
	logCause = regexp.MustCompile(` cause=(\S+)`)
)

// journalLines keeps, of each line of kleidi's own log, the time, the level, the message,
// which is a constant of the code, and the cause. It drops the rest of the line, and
// every line of another form.
func journalLines(journal []byte) []byte {
	var b strings.Builder
	for line := range strings.Lines(string(journal)) {
		m := logLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			continue
		}
		if _, err := time.Parse(time.RFC3339Nano, m[1]); err != nil {
			continue
		}
		b.WriteString(m[0])
		if c := logCause.FindStringSubmatch(line); c != nil && slices.Contains(seal.Causes(), seal.Cause(c[1])) {
			b.WriteString(c[0])
		}
		b.WriteString("\n")
	}
	return []byte(b.String())
}
