package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// recoveryChoice is how the keyring can be opened when the TPM does not.
type recoveryChoice struct {
	recipients []string
	none       bool
	accepted   bool
	importFrom string // config.json of kleidi 1.x
	generates  bool   // the token makes its key first
	breaks     bool   // one wrapper alone may open what two of two protect
}

func (a *app) newInit() *cobra.Command {
	var choice recoveryChoice
	var anchor string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a KEK and a keyring, and seal the KEK to this machine's TPM",
		Long: `Make a KEK and a keyring, and seal the KEK to this machine's TPM under the way in
which it booted now. An existing keyring is never touched.

The KEK also gets a recovery slot, for the day on which the TPM does not open: its
identity is shown once and asked for again. With --recovery-recipient the slot is
made for an age public key whose identity you keep elsewhere.`,
		Example: `  kleidi init
  kleidi init --recovery-recipient age1…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := choice.check(a); err != nil {
				return err
			}
			return a.runInit(cmd, &choice, anchor)
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&choice.recipients, "recovery-recipient", nil, "age public key (age1…) to make the recovery slot for; may be repeated")
	flags.BoolVar(&choice.breaks, "break-two-of-two", false, "make the recovery slot although it opens alone what unlock.order wants two wrappers for")
	flags.StringVar(&choice.importFrom, "import-config", "", "config.json of kleidi 1.x: its token and key wrap the KEK as well")
	_ = cmd.MarkFlagFilename("import-config", "json")
	flags.BoolVar(&choice.generates, "generate-key", false, "have the configured token make the key first: AES-256, sensitive, not extractable")
	flags.StringVar(&anchor, "anchor", "", "where to keep the anchor: file or tpm; it has to be what anchor.store says (default anchor.store)")
	flags.BoolVar(&choice.none, "no-recovery", false, "make no recovery slot: if the TPM or the machine fails, all Secrets are lost")
	flags.BoolVar(&choice.accepted, "accept-data-loss", false, "acknowledge what --no-recovery means")
	return cmd
}

func (c *recoveryChoice) check(a *app) error {
	switch {
	case c.none && len(c.recipients) > 0:
		return errors.New("--no-recovery and --recovery-recipient exclude each other; give one of them")
	case c.none && !c.accepted:
		return errors.New("--no-recovery: if this TPM fails, is cleared, or the machine boots otherwise, every Secret is lost; if that is what you want, add --accept-data-loss")
	case !c.none && len(c.recipients) == 0 && a.output == "json":
		return errors.New("-o json can't show a recovery identity; add --recovery-recipient age1…")
	}
	return nil
}

// initResult is what init shows.
type initResult struct {
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Keyring   string         `json:"keyring"`
	Node      string         `json:"node"`
	EK        string         `json:"ek,omitempty"` // where there is a TPM slot
	Slots     []string       `json:"slots"`
	// PKCS11 is what --import-config adds to the configuration.
	PKCS11 *importedToken `json:"pkcs11,omitempty"`
}

type importedToken struct {
	Module  string `json:"module"`
	URI     string `json:"uri"`
	PINFile string `json:"pinFile"`
}

// configOf returns the configuration, and the token of kleidi 1.x that it names by
// way of --import-config.
func (a *app) configOf(choice *recoveryChoice) (*config.Config, *imported, error) {
	if choice.importFrom == "" {
		cfg, err := a.config()
		return cfg, nil, err
	}
	var i *imported
	cfg, err := a.config(func(c *config.Config) (err error) {
		i, err = importConfig(choice.importFrom, c)
		return err
	})
	if err != nil && i != nil {
		i.pin.Close()
	}
	return cfg, i, err
}

func (a *app) runInit(cmd *cobra.Command, choice *recoveryChoice, anchor string) error {
	cfg, i, err := a.configOf(choice)
	if err != nil {
		return err
	}
	if i != nil {
		defer i.pin.Close()
	}
	if anchor != "" && anchor != cfg.Anchor.Store {
		return fmt.Errorf("--anchor %s: anchor.store is %s; set anchor.store in the configuration, so that kleidi serve demands the same", anchor, cfg.Anchor.Store)
	}
	n, err := newNode(cfg, logger(cfg), nil)
	if err != nil {
		return err
	}
	defer n.close()
	if i != nil {
		if err := n.takeOver(i); err != nil {
			return fmt.Errorf("init: %w", err)
		}
	}
	result, err := n.initialize(cmd, choice)
	n.saySpent(cmd.ErrOrStderr())
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	if i != nil {
		result.PKCS11 = &importedToken{i.token.Module, i.token.URI, i.token.PINFile}
	}
	n.state.release()
	if client, err := admin.Dial(cmd.Context(), cfg.Admin.Socket); err == nil {
		if _, err := admin.Call(cmd.Context(), client, admin.Reload, admin.ReloadRequest{}); err != nil {
			return fmt.Errorf("the keyring is made, but the running kleidi serve does not open it: %w", err)
		}
	}
	return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
		node := result.Node
		if result.EK != "" {
			node += fmt.Sprintf(" (EK %.23s…)", result.EK)
		}
		fmt.Fprintf(w, "\nkeyring %s made\n  cluster ID  %s\n  key ID      %s\n  node        %s\n", result.Keyring, result.ClusterID, result.KeyID, node)
		for _, s := range result.Slots {
			fmt.Fprintf(w, "  slot        %s\n", s)
		}
		if n.imported != nil {
			n.imported.print(w, cfg.Unlock.Order)
		}
		fmt.Fprintf(w, "\nnext: start kleidi serve, and give kube-apiserver what kleidi encryption-config prints\n")
	})
}

// initialize makes the keyring. Until its last step nothing but the TPM's epoch
// counter exists, and a second init goes on from there. The anchor comes first: a
// keyring without an anchor would not be trusted, an anchor without a keyring is nothing.
func (n *node) initialize(cmd *cobra.Command, choice *recoveryChoice) (*initResult, error) {
	ctx := cmd.Context()
	progress := func(s string) { fmt.Fprintln(cmd.ErrOrStderr(), "[init]", s) }
	if n.remote != nil {
		return nil, errors.New("tpm.verifier is set, and no verifier knows this cluster yet; leave it out, and set it once the verifier has registered this node, see docs/remote-attestation.md")
	}
	if !choice.none {
		if err := n.breaks(seal.TypeRecovery, nil, choice.breaks); err != nil {
			return nil, err
		}
	}
	if err := n.own(); err != nil {
		return nil, err
	}
	if err := n.vacant(ctx); err != nil {
		return nil, err
	}
	if !choice.generates {
		return n.firstKeyring(cmd, choice, progress)
	}
	if err := n.firstKey(ctx, progress); err != nil {
		return nil, err
	}
	r, err := n.firstKeyring(cmd, choice, progress)
	if err != nil {
		err = keyMade(err)
	}
	return r, err
}

// firstKeyring makes the KEK, its slots and the keyring.
func (n *node) firstKeyring(cmd *cobra.Command, choice *recoveryChoice, progress func(string)) (*initResult, error) {
	ctx := cmd.Context()
	kek, err := n.mem.NewKEK()
	if err != nil {
		return nil, err
	}
	defer kek.Close() // harmless after the keyring, which takes it, has closed it
	ek, slots, err := n.firstSlots(ctx, kek, progress)
	if err != nil {
		return nil, err
	}
	if err := rotation.Prove(ctx, kek, slots, n.wrappers()); err != nil {
		return nil, err
	}
	if !choice.none {
		recoverySlot, err := n.makeRecovery(cmd, kek, choice.recipients)
		if err != nil {
			return nil, err
		}
		slots = append(slots, recoverySlot)
	}
	if n.imported != nil { // only now: until here nothing is made that an operator who gives up would leave
		if err := n.imported.keepPIN(); err != nil {
			return nil, err
		}
	}
	return n.saveFirst(ctx, kek, slots, ek, progress)
}

// firstSlots wraps the KEK by every wrapper that may open the keyring at start.
func (n *node) firstSlots(ctx context.Context, kek *seal.Secret, progress func(string)) (ek string, slots []seal.Slot, err error) {
	order := slices.Clone(n.cfg.Unlock.Order)
	if n.imported != nil && !n.imported.opens(order) {
		order = append(order, seal.TypePKCS11)
	}
	for _, kind := range order {
		var slot seal.Slot
		if kind == seal.TypeTPM || twoOfTwo(kind) != "" {
			ek, slot, err = n.firstTPM(ctx, kek, progress)
		} else {
			progress("wrapping a fresh KEK by " + kind)
			slot, err = n.wrapper(kind).Wrap(ctx, kek)
		}
		if err != nil {
			return "", nil, err
		}
		slots = append(slots, slot)
	}
	if !n.opensWithTPM() && n.attests() {
		err = n.gate.Attest(ctx, nil)
	}
	return ek, slots, err
}

// firstKey has the token make the key by which it wraps.
func (n *node) firstKey(ctx context.Context, progress func(string)) error {
	if n.hsm == nil || n.imported != nil || !slices.ContainsFunc(n.cfg.Unlock.Order, func(kind string) bool { return kind == seal.TypePKCS11 || twoOfTwo(kind) == seal.TypePKCS11 }) {
		return errors.New("--generate-key is for a token that is configured, and that unlock.order names; set both, or run kleidi slot add pkcs11 --generate-key once the keyring is made")
	}
	progress("having the token make its key")
	_, err := n.hsm.GenerateKey(ctx)
	return err
}

// firstTPM seals the KEK to the running boot.
func (n *node) firstTPM(ctx context.Context, kek *seal.Secret, progress func(string)) (ek string, slot seal.Slot, err error) {
	progress("looking for the TPM at " + n.cfg.TPM.Device)
	if ek, err = n.tpm.Provision(ctx); err != nil {
		return "", slot, err
	}
	if err := n.firstPolicy(ctx, progress); err != nil {
		return "", slot, err
	}
	progress("attesting this boot, and sealing a fresh KEK to it")
	state, err := n.gate.State(ctx)
	if err != nil {
		return "", slot, err
	}
	if slot, err = n.wrapState(ctx, n.tpm, kek, state); err != nil {
		return "", slot, err
	}
	return ek, slot, n.anchorable()
}

// firstPolicy records the running boot as the boot policy, where the configuration
// names one and there is no such file yet.
func (n *node) firstPolicy(ctx context.Context, progress func(string)) error {
	path := n.cfg.TPM.BootPolicy
	if path == "" {
		return nil
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p, err := n.recordPolicy(ctx, nil)
	if err != nil {
		return err
	}
	progress("recording this boot as the boot policy " + path)
	return writeNew(path, p.Marshal())
}

// anchorable refuses an anchor that any boot could write: without Secure Boot, PCR 7 is
// the same whatever is started.
func (n *node) anchorable() error {
	if n.cfg.Anchor.Store != config.AnchorTPM || !slices.Equal(n.cfg.Anchor.PCRs, []int{7}) {
		return nil
	}
	if on, known := n.gate.Last().Log.SecureBoot(); on && known {
		return nil
	}
	return errors.New("anchor.store tpm: Secure Boot is off, and without it any boot could write the anchor; switch Secure Boot on, or bind the anchor to more with anchor.pcrs")
}

// vacant refuses to make a keyring where there is one, or was one: the previous
// revision may be all that is left of it.
func (n *node) vacant(ctx context.Context) error {
	_, _, err := n.keyring.Load(ctx)
	if err == nil {
		return fmt.Errorf("%s exists, and init never replaces a keyring; see kleidi status, or move the folder %s away if this is to be a new cluster", n.cfg.Keyring(), n.cfg.State.Dir)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	anchor, err := n.anchor.Load(ctx)
	if errors.Is(err, nv.ErrAnchorMissing) || errors.Is(err, nv.ErrAnchorUnwritten) {
		err = nil
	}
	if errors.Is(err, nv.ErrAnchorReplaced) {
		return fmt.Errorf("%w; or, if this is to be a new cluster: tpm2_nvundefine %#x", err, n.cfg.Anchor.Index)
	}
	if err != nil {
		return err
	}
	// An anchor of the first revision may also be what an init that was killed left.
	if _, err = n.keyring.Previous(ctx); errors.Is(err, fs.ErrNotExist) && (anchor == nil || anchor.Revision == 1) {
		return nil
	}
	return fmt.Errorf("%s is gone, and its previous revision or its anchor is still there; run kleidi keyring restore --previous, or move the folder %s away if this is to be a new cluster", n.cfg.Keyring(), n.cfg.State.Dir)
}

func (n *node) saveFirst(ctx context.Context, kek *seal.Secret, slots []seal.Slot, ek string, progress func(string)) (*initResult, error) {
	var cluster seal.ClusterID
	rand.Read(cluster[:])
	k, err := keyring.New(cluster, kek, slots, []keyring.Node{{Name: n.cfg.Node, EK: ek}}, time.Now())
	if err != nil {
		return nil, err
	}
	defer k.Close()
	progress("saving the keyring to " + n.cfg.Keyring())
	if err := n.anchor.Replace(ctx, k.Anchor()); err != nil {
		return nil, err
	}
	if _, err := n.keyring.Save(ctx, k.Marshal(), ""); err != nil {
		return nil, err
	}
	r := &initResult{ClusterID: cluster, KeyID: k.CurrentID(), Keyring: n.cfg.Keyring(), Node: n.cfg.Node, EK: ek}
	for _, s := range slots {
		r.Slots = append(r.Slots, s.Type+": "+n.binding(s))
	}
	return r, nil
}

// makeRecovery wraps the KEK to the recipients, or to an identity made now.
func (n *node) makeRecovery(cmd *cobra.Command, kek *seal.Secret, recipients []string) (seal.Slot, error) {
	var identity *seal.Secret
	if len(recipients) == 0 {
		var recipient string
		var err error
		if identity, recipient, err = recovery.GenerateIdentity(n.mem); err != nil {
			return seal.Slot{}, err
		}
		defer identity.Close()
		recipients = []string{recipient}
	}
	w, err := recovery.NewWrapper(n.mem, recipients)
	if err != nil {
		return seal.Slot{}, fmt.Errorf("--recovery-recipient: %w", err)
	}
	slot, err := w.Wrap(cmd.Context(), kek)
	if err == nil && identity != nil {
		err = n.handOver(cmd, identity, slot, kek)
	}
	return slot, err
}

// readBackTries is how often the identity may be mistyped.
const readBackTries = 3

// handOver shows the identity once, and opens the slot with what the operator
// gives back: an identity that nobody kept opens nothing.
func (n *node) handOver(cmd *cobra.Command, identity *seal.Secret, slot seal.Slot, kek *seal.Secret) error {
	out := cmd.OutOrStdout()
	if f, ok := out.(*os.File); ok && isRegular(f) {
		return errors.New("standard output is a file, and the recovery identity must not lie on this machine; run kleidi init at a terminal, or give --recovery-recipient; nothing was made")
	}
	fmt.Fprint(out, "\nRecovery identity. It is shown once. Keep it off this machine: it opens the keyring\nwhen the TPM does not, and so it does for anyone who finds it.\n\n  ")
	identity.With(func(b []byte) { _, _ = out.Write(bytes.TrimSpace(b)) })
	fmt.Fprint(out, "\n\n")
	in := lines(cmd)
	for range readBackTries {
		given, err := in("give it back, to show that you kept it (not shown): ")
		if err != nil {
			return notGivenBack(err)
		}
		if err = n.opens(cmd.Context(), given, slot, kek); err == nil {
			return nil
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "that does not open the recovery slot:", err)
	}
	return notGivenBack(fmt.Errorf("%d lines did not open the recovery slot", readBackTries))
}

func notGivenBack(err error) error {
	if errors.Is(err, io.EOF) {
		err = errors.New("the input ended")
	}
	return fmt.Errorf("the recovery identity was not given back: %w; nothing was made, run kleidi init again, or name --recovery-recipient age1…", err)
}

func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

func (n *node) opens(ctx context.Context, identity []byte, slot seal.Slot, kek *seal.Secret) error {
	secret, err := n.mem.Take(identity)
	if err != nil {
		return err
	}
	defer secret.Close()
	w, err := recovery.NewOpener(n.mem, secret)
	if err != nil {
		return err
	}
	return rotation.Prove(ctx, kek, []seal.Slot{slot}, []seal.Wrapper{w})
}

// lines reads secrets line by line: hidden at a terminal, else from standard input.
func lines(cmd *cobra.Command) func(prompt string) ([]byte, error) {
	if f, ok := cmd.InOrStdin().(*os.File); ok && isTerminal(f) {
		return func(prompt string) ([]byte, error) { return promptSecret(cmd, prompt) }
	}
	in := cmd.InOrStdin()
	return func(string) ([]byte, error) { return readLine(in) }
}

// readLine reads byte by byte, so that no buffer keeps what follows.
func readLine(r io.Reader) ([]byte, error) {
	b := make([]byte, 0, maxIdentity)
	var c [1]byte
	for len(b) < maxIdentity {
		if _, err := io.ReadFull(r, c[:]); err != nil {
			if len(b) > 0 && errors.Is(err, io.EOF) {
				return b, nil
			}
			return nil, err
		}
		if c[0] == '\n' {
			return b, nil
		}
		b = append(b, c[0])
	}
	return nil, fmt.Errorf("more than %d bytes", maxIdentity)
}
