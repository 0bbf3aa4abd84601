package text

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Slots prints a table of the slots.
func Slots(w io.Writer, slots []admin.SlotReport) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tNODE\tFOR\tWRAPPED BY")
	for _, s := range slots {
		by := s.Binding
		if s.Type == seal.TypeSkipped && s.Problem != nil {
			by += "; " + s.Problem.Hint
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", s.Name, orDash(s.Node), orDash(s.Use), by)
	}
	_ = t.Flush()
}

// SlotTests prints which slots open.
func SlotTests(w io.Writer, r admin.SlotTests) {
	for _, s := range r.Slots {
		verdict := "opens"
		switch {
		case s.ForNextBoot:
			verdict = "for the next boot"
		case !s.Opens:
			verdict = "DOES NOT OPEN"
		}
		fmt.Fprintf(w, "%-14s %s (%v)\n", s.Name, verdict, s.Duration.Round(time.Millisecond))
		problem(w, s.Problem)
		for _, warning := range s.Warnings {
			fmt.Fprintf(w, "%-14s   %s\n", "", strings.Replace(warning, "; ", "\n"+strings.Repeat(" ", 17)+"-> ", 1))
		}
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// Keyring prints a stored keyring. binding describes what a slot is bound to.
func Keyring(w io.Writer, u *keyring.Untrusted, binding func(seal.Slot) string) {
	i := u.Info()
	row(w, "cluster ID", i.ClusterID.String())
	row(w, "revision", fmt.Sprint(i.Revision))
	row(w, "current KEK", fmt.Sprintf("%s  made %s", i.Current.KeyID, i.Current.Created.Local().Format(time.DateTime)))
	for _, s := range u.Slots() {
		row(w, "  slot", s.Type+"  "+s.Node+"  "+binding(s))
	}
	for _, r := range i.Retired {
		row(w, "retired KEK", fmt.Sprintf("%s  made %s, retired %s", r.KeyID, r.Created.Local().Format(time.DateTime), r.Retired.Local().Format(time.DateTime)))
	}
	for _, node := range i.Nodes {
		row(w, "node", node.Name+"  EK "+node.EK)
	}
	fmt.Fprintln(w, "\nnot verified; kleidi keyring verify does that")
}

// SealedPIN prints what to do with a sealed PIN.
func SealedPIN(w io.Writer, p *slots.SealedPIN) {
	fmt.Fprintf(w, "PIN sealed to this machine's TPM, usable only on this machine, written to %s\n", p.File)
	fmt.Fprintf(w, "it unseals while PCR 7 (%s) is what it is now: seal it again when Secure Boot's state or keys change\n", p.Bank)
	fmt.Fprintf(w, "next: set pkcs11.sealedPINFile: %s in place of pkcs11.pinFile, restart kleidi serve,\nand see with kleidi slot test that the token takes the PIN\n", p.File)
	if p.PINFile != "" {
		fmt.Fprintf(w, "then keep the PIN off this machine, and remove it here: shred -u %s\n", p.PINFile)
		fmt.Fprintf(w, "flash, snapshots, journals and backups may still hold copies: only another PIN on the token makes them worthless\n")
	}
}

// VaultKey prints what to do with a client key in the TPM.
func VaultKey(w io.Writer, k *slots.VaultKey) {
	fmt.Fprintf(w, "client key made in the TPM, usable only on this machine, written to %s\n", k.Key)
	fmt.Fprintf(w, "certificate request for %q written to %s: have your CA sign it, then set\nvault.auth.tpmKeyFile and vault.auth.certFile\n", k.Name, k.Request)
	fmt.Fprintf(w, "it signs while PCR 7 (%s) is what it is now: make a new one when Secure Boot's state or keys change\n", k.Bank)
}
