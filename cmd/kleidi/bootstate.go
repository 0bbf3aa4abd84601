package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/predict"
)

// Where systemd puts what a UKI brings with it.
const (
	systemdStates = "/run/systemd/tpm2-pcr-signature.json"
	systemdKey    = "/run/systemd/tpm2-pcr-public-key.pem"
)

func (a *app) newBootState() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bootstate",
		Short: "Sign, add, list and revoke boot states that an operator's key vouches for",
		Long: `A key that is kept elsewhere signs the PCR values of a boot, before it is rolled out.
A node that knows the public key opens in every boot state that it signed, with Secure
Boot as it is. systemd's signed PCR 11 values (.pcrsig) are such boot states.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.newStateSign(), a.newStateAdd(), a.newStateList(), a.newStateRevoke())
	return cmd
}

// signing is what kleidi bootstate sign was told.
type signing struct {
	key, cluster, out, what, bank string
	generation                    uint64
	systemd                       bool
	pcrs                          []int
	logs                          attest.Logs
	files                         nextFiles
}

func (a *app) newStateSign() *cobra.Command {
	var s signing
	cmd := &cobra.Command{
		Use:   "sign --key FILE --cluster-id ID --event-log FILE",
		Short: "Sign a boot state with the operator's key, on any machine",
		Long: `Sign the boot state of a saved event log, or of the next boot as it follows from that
log and the files in --next-…. Nothing on this machine is asked or changed: the event
log is taken at its word, so take it from a machine that you trust. The result is a
file for kleidi bootstate add, in systemd's format.`,
		Example: `  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out boot-states.pem
  kleidi bootstate sign --key boot-states.pem --cluster-id ID --event-log node.log \
      --next-uki linux-6.12.58.efi --out linux-6.12.58.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			nextFilesGiven(cmd, &s.files)
			state, b, err := s.sign()
			if err != nil {
				return fmt.Errorf("sign: %w", err)
			}
			if s.out == "" {
				_, err := cmd.OutOrStdout().Write(b)
				return err
			}
			if err := writeNew(s.out, b); err != nil {
				return fmt.Errorf("sign: %w", err)
			}
			result := map[string]any{"file": s.out, "bank": s.bank, "pcrs": state.PCRs, "key": hex.EncodeToString(state.KeyFingerprint[:])}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				fmt.Fprintf(w, "boot state of PCR %s (%s) signed by key %x, written to %s\n", join(state.PCRs), s.bank, state.KeyFingerprint[:8], s.out)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.key, "key", "", "the operator's private key, in PEM: RSA or ECDSA")
	f.StringVar(&s.cluster, "cluster-id", "", "the cluster that it is signed for, as kleidi status shows it")
	f.Uint64Var(&s.generation, "generation", 1, "a later one revokes what was signed for the earlier ones, once it is added")
	f.BoolVar(&s.systemd, "systemd", false, "sign PCR 11 alone as systemd does: for any cluster, and without generations")
	f.StringVar(&s.logs.Firmware, "event-log", "", "saved event log of the firmware")
	f.StringVar(&s.logs.Userspace, "userspace-event-log", "", "saved event log of systemd")
	f.StringVar(&s.bank, "bank", "sha256", "PCR bank: sha256 or sha384")
	f.IntSliceVar(&s.pcrs, "pcrs", nil, "the PCRs to sign (default: by how the machine boots, without 7 and 14)")
	f.StringVar(&s.what, "what", "", "a note for people")
	f.StringVar(&s.out, "out", "", "new file to write to; standard output if empty")
	registerNextFiles(cmd, &s.files)
	for _, name := range []string{"key", "event-log"} {
		_ = cmd.MarkFlagRequired(name)
		_ = cmd.MarkFlagFilename(name)
	}
	return cmd
}

func (s *signing) sign() (state bootstate.State, file []byte, err error) {
	ref, err := s.ref()
	if err != nil {
		return state, nil, err
	}
	pem, err := readKeyFile(s.key)
	if err != nil {
		return state, nil, err
	}
	defer clear(pem)
	signer, err := bootstate.ParsePrivateKey(pem)
	if err != nil {
		return state, nil, fmt.Errorf("%s: %w", s.key, err)
	}
	boot, err := s.boot()
	if err != nil {
		return state, nil, err
	}
	if state, err = bootstate.Sign(signer, boot.PCR, ref, s.what); err != nil {
		return state, nil, err
	}
	f, err := bootstate.New(state)
	if err != nil {
		return state, nil, err
	}
	b, err := f.Marshal()
	return state, append(b, '\n'), err
}

func (s *signing) ref() ([]byte, error) {
	if s.systemd {
		if s.cluster != "" {
			return nil, errors.New("--systemd and --cluster-id exclude each other; give one of them")
		}
		return nil, nil
	}
	cluster, err := seal.ParseClusterID(s.cluster)
	if err != nil {
		return nil, fmt.Errorf("--cluster-id: %w; kleidi status shows it", err)
	}
	if s.generation < 1 || s.generation > maxGeneration {
		return nil, fmt.Errorf("--generation %d; want 1 to %d", s.generation, maxGeneration)
	}
	return bootstate.Ref(cluster, s.generation), nil
}

// boot is the boot state to sign.
func (s *signing) boot() (tpm.BootState, error) {
	bank, err := tpm.ParseBank(s.bank)
	if err != nil {
		return tpm.BootState{}, fmt.Errorf("--bank: %w", err)
	}
	log, err := s.logs.Read()
	if err != nil {
		return tpm.BootState{}, err
	}
	change, err := s.files.change()
	if err != nil {
		return tpm.BootState{}, err
	}
	if n := change.Next; n.UKI != nil || n.Kernel != nil || n.Initrd != nil || n.GRUBConfig != nil || n.CommandLine != nil || change.Dbx != nil {
		if log, err = predict.Predict(log, change); err != nil {
			return tpm.BootState{}, err
		}
	}
	pcrs := s.pcrs
	switch {
	case len(pcrs) == 0 && s.systemd:
		pcrs = []int{11}
	case len(pcrs) == 0:
		pcrs = slices.DeleteFunc(log.BootType().PCRs(log), func(i int) bool { return i == 7 || i == 14 })
	}
	if len(pcrs) == 0 {
		return tpm.BootState{}, errors.New("the event log shows neither a unified kernel image nor GRUB nor the kernel's EFI stub; name the PCRs with --pcrs")
	}
	return attest.Predicted(log, bank, pcrs)
}

// maxKeyFile bounds a file with a public key, in bytes.
const maxKeyFile = 64 << 10

func (a *app) newStateAdd() *cobra.Command {
	var key string
	var systemd bool
	cmd := &cobra.Command{
		Use:   "add FILE --public-key FILE",
		Short: "Let the keyring open in boot states that a key signed",
		Long: `Let the keyring open in the signed boot states of a file. The first ones of a key make
a slot for whatever it signs from then on. Those of a later generation revoke all of the
earlier one. With --systemd, take those that the running UKI brought with it.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			file := systemdStates
			switch {
			case systemd && (len(args) > 0 || key != ""):
				return errors.New("--systemd takes no file and no --public-key")
			case systemd:
				key = systemdKey
			case len(args) == 0 || key == "":
				return errors.New("name the file of signed boot states and --public-key, or give --systemd")
			default:
				file = args[0]
			}
			req := admin.AddBootStatesRequest{}
			var err error
			if req.States, err = readFile(file, bootstate.MaxSize); err != nil {
				return fmt.Errorf("add: %w", err)
			}
			if req.PublicKey, err = readFile(key, maxKeyFile); err != nil {
				return fmt.Errorf("add: %w", err)
			}
			s, err := operate(cmd.Context(), a, admin.AddBootStates, req, unlocked((*node).addBootStates))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().StringVar(&key, "public-key", "", "the key that signed, in PEM (openssl pkey -pubout)")
	cmd.Flags().BoolVar(&systemd, "systemd", false, "take "+systemdStates+" and "+systemdKey)
	return cmd
}

// stateReport is one signed boot state, as list shows it.
type stateReport struct {
	File       string `json:"file"`
	Key        string `json:"key"`
	Generation uint64 `json:"generation"`
	Bank       string `json:"bank"`
	PCRs       []int  `json:"pcrs"`
	What       string `json:"what,omitempty"`
	// Counts says whether a slot is for its key and generation.
	Counts bool `json:"counts"`
}

func (a *app) newStateList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "Show the signed boot states, and which of them a slot is for",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			r, err := operate(cmd.Context(), a, admin.Status, admin.StatusRequest{}, (*node).offlineStatus)
			if err != nil {
				return err
			}
			states, err := listStates(append([]string{cfg.BootStates()}, cfg.TPM.BootStates...), r)
			if err != nil {
				return requireRoot(fmt.Errorf("list: %w", err))
			}
			return a.show(cmd.OutOrStdout(), states, func(w io.Writer) { printStates(w, states) })
		},
	}
}

func listStates(paths []string, r admin.StatusReport) ([]stateReport, error) {
	cluster, err := seal.ParseClusterID(r.ClusterID)
	if err != nil {
		return nil, errors.New("there is no keyring; run kleidi init first")
	}
	states := []stateReport{}
	for _, path := range paths {
		f, err := readBootStates(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, s := range f.States() {
			g, known := generation(cluster, s.Ref)
			e := stateReport{File: path, Key: hex.EncodeToString(s.KeyFingerprint[:]), Generation: g, Bank: eventlog.BankName(s.Bank), PCRs: s.PCRs, What: s.What}
			e.Counts = known && slices.ContainsFunc(r.Slots, func(slot admin.SlotReport) bool { return slot.Signer == e.Key && slot.Generation == g })
			states = append(states, e)
		}
	}
	return states, nil
}

func printStates(w io.Writer, states []stateReport) {
	if len(states) == 0 {
		fmt.Fprintln(w, "there are no signed boot states; see docs/updates.md")
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tGENERATION\tPCRS\tA SLOT IS FOR IT\tFILE\tWHAT")
	for _, s := range states {
		g, slot := fmt.Sprint(s.Generation), "yes"
		if s.Generation == 0 {
			g = "-"
		}
		if !s.Counts {
			slot = "no"
		}
		fmt.Fprintf(t, "%.16s\t%s\t%s (%s)\t%s\t%s\t%s\n", s.Key, g, join(s.PCRs), s.Bank, slot, s.File, s.What)
	}
	_ = t.Flush()
}

func (a *app) newStateRevoke() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke KEY",
		Short: "Take away what a key signed, by the beginning of its fingerprint",
		Long: `Take the slot of a key away and end its epoch: the TPM refuses it from then on, kept
copies included. To revoke some of the boot states that a key signed, sign those that
stay for a later generation, and add them.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := operate(cmd.Context(), a, admin.RevokeBootStates, admin.RevokeBootStatesRequest{Key: args[0]}, unlocked((*node).revokeBootStates))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
}
