package join

import (
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/seal"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

// Bounds of a grant, in bytes and numbers.
const (
	// MaxFiles bounds all bootstrap files of a node together, in bytes.
	MaxFiles  = 64 << 10
	maxSlots  = 16
	maxNames  = 16
	maxName   = 128
	maxGrant  = 4 << 20
	maxMAC    = 64
	nameChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
)

// Grant is what a joining node receives.
type Grant struct {
	// Keyring is the shared keyring. It holds no slot of a joining node's TPM.
	Keyring []byte
	// Current and Staged are import slots of these KEKs for the node.
	Current, Staged []seal.Slot
	Files           []File
}

// File is a file of the cluster's own bootstrap.
type File struct {
	Name    string
	Content []byte
}

// Wipe clears the files' contents.
func (g *Grant) Wipe() {
	for _, f := range g.Files {
		clear(f.Content)
	}
}

// CheckFiles refuses names that could lead out of a folder, and files that are too
// large together.
func CheckFiles(names []string, size int) error {
	seen := map[string]bool{}
	for _, n := range names {
		if n == "" || len(n) > maxName || n[0] == '.' || !consistsOf(n, nameChars) {
			return fmt.Errorf("bootstrap file %.64q: want a name of letters, digits, dots, dashes and underscores that begins with no dot", n)
		}
		if seen[n] {
			return fmt.Errorf("two bootstrap files are named %s", n)
		}
		seen[n] = true
	}
	if len(names) > maxNames || size > MaxFiles {
		return fmt.Errorf("%d bootstrap files of %d bytes; at most %d files of %d KiB in all are handed over", len(names), size, maxNames, MaxFiles>>10)
	}
	return nil
}

func consistsOf(s, chars string) bool {
	known := map[rune]bool{}
	for _, c := range chars {
		known[c] = true
	}
	for _, c := range s {
		if !known[c] {
			return false
		}
	}
	return true
}

func (g *Grant) check(node string) error {
	if len(g.Keyring) == 0 || len(g.Current) == 0 || len(g.Current) > maxSlots || len(g.Staged) > maxSlots {
		return errors.New("it holds no keyring, or no slot, or too many")
	}
	for _, s := range append(append([]seal.Slot{}, g.Current...), g.Staged...) {
		if s.Node != node || len(s.Data) > seal.MaxSlotData {
			return errors.New("a slot in it is of another node, or too large")
		}
	}
	var names []string
	size := 0
	for _, f := range g.Files {
		names, size = append(names, f.Name), size+len(f.Content)
	}
	return CheckFiles(names, size)
}

func toHello(h *Hello) *joinproof.Hello {
	out := &joinproof.Hello{Cluster: h.GetCluster(), Node: h.GetNode(), EK: h.GetEk(), EKCertificate: h.GetEkCertificate(), AK: h.GetAk(), SRK: h.GetSrk(),
		Terms: joinproof.Terms{Bank: exchange.BankOf(h.GetBank()), EpochIndex: h.GetEpochIndex(), Epoch: h.GetEpoch(), Verifier: h.GetVerifier(), Signer: h.GetSigner(), Ref: h.GetRef()}}
	for _, f := range h.GetFormats() {
		out.Formats = append(out.Formats, int(f))
	}
	for _, i := range h.GetPcrs() {
		out.PCRs = append(out.PCRs, int(i))
	}
	return out
}

func fromHello(h *joinproof.Hello) *FromJoiner {
	out := &Hello{Cluster: h.Cluster, Node: h.Node, Ek: h.EK, EkCertificate: h.EKCertificate, Ak: h.AK, Srk: h.SRK, Bank: exchange.BankName(h.Bank),
		EpochIndex: h.EpochIndex, Epoch: h.Epoch, Verifier: h.Verifier, Signer: h.Signer, Ref: h.Ref}
	for _, f := range h.Formats {
		out.Formats = append(out.Formats, uint32(f))
	}
	for _, i := range h.PCRs {
		out.Pcrs = append(out.Pcrs, uint32(i))
	}
	return &FromJoiner{Message: &FromJoiner_Hello{out}}
}

func fromChallenge(c *protocol.Challenge) *FromVerifier {
	return &FromVerifier{Message: &FromVerifier_Challenge{exchange.FromChallenge(c)}}
}

func fromEvidence(e *protocol.Evidence) *FromJoiner {
	return &FromJoiner{Message: &FromJoiner_Statement{exchange.FromEvidence(e)}}
}

func fromPart(p *exchange.LogPart) *FromJoiner { return &FromJoiner{Message: &FromJoiner_Log{p}} }

func toSlots(in []*Slot) (out []seal.Slot) {
	for _, s := range in {
		out = append(out, seal.Slot{Type: s.GetType(), Node: s.GetNode(), Data: s.GetData()})
	}
	return out
}

func fromSlots(in []seal.Slot) (out []*Slot) {
	for _, s := range in {
		out = append(out, &Slot{Type: s.Type, Node: s.Node, Data: s.Data})
	}
	return out
}

func toGrant(m *GrantMessage) *Grant {
	g := &Grant{Keyring: m.GetKeyring(), Current: toSlots(m.GetCurrent()), Staged: toSlots(m.GetStaged())}
	for _, f := range m.GetBootstrap() {
		g.Files = append(g.Files, File{Name: f.GetName(), Content: f.GetContent()})
	}
	return g
}

func fromGrant(g *Grant) *FromVerifier {
	m := &GrantMessage{Keyring: g.Keyring, Current: fromSlots(g.Current), Staged: fromSlots(g.Staged)}
	for _, f := range g.Files {
		m.Bootstrap = append(m.Bootstrap, &BootstrapFile{Name: f.Name, Content: f.Content})
	}
	return &FromVerifier{Message: &FromVerifier_Grant{m}}
}
