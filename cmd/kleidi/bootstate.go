package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/inspect"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// The paths at which systemd puts the files of a UKI.
const (
	systemdStates = "/run/systemd/tpm2-pcr-signature.json"
	systemdKey    = "/run/systemd/tpm2-pcr-public-key.pem"
)

func newBootState(a *app) *cobra.Command {
	return group("bootstate", "Sign, add, list and revoke boot states with an operator's key", `An operator's key, kept on another machine, signs the PCR values of a boot before the
boot is rolled out. A node that knows the public key opens in every boot state signed
by the key, as long as Secure Boot does not change. systemd's signed PCR 11 values
(.pcrsig) are such boot states.`,
		newStateSign(a), newStateAdd(a), newStateList(a), newStateRevoke(a))
}

func newStateSign(a *app) *cobra.Command {
	var s reseal.Signing
	cmd := &cobra.Command{
		Use:   "sign --key FILE --cluster-id ID --event-log FILE",
		Short: "Sign a boot state with the operator's key, on any machine",
		Long: `Sign the boot state of a saved event log, or the next boot state, predicted from that
log and the files in --next-…. The command does not verify the log, and uses nothing
else on this machine: use the log of a machine that you trust. The result is a file for
kleidi bootstate add, in systemd's format.`,
		Example: `  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out boot-states.pem
  kleidi bootstate sign --key boot-states.pem --cluster-id ID --event-log node.log \
      --next-uki linux-6.12.58.efi --out linux-6.12.58.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := runningAlone(cmd, &s.Files); err != nil {
				return err
			}
			if s.Systemd && cmd.Flags().Changed("generation") {
				return seal.Errorf("", "give one of them", "--systemd excludes --generation: systemd's form has none")
			}
			state, b, err := s.Sign()
			if err != nil {
				return fmt.Errorf("sign: %w", err)
			}
			if s.Out == "" {
				_, err := cmd.OutOrStdout().Write(b)
				return err
			}
			if err := files.WriteNew(s.Out, b); err != nil {
				return fmt.Errorf("sign: %w", err)
			}
			result := signedState{s.Out, s.Bank, state.PCRs, hex.EncodeToString(state.KeyFingerprint[:])}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				fmt.Fprintf(w, "boot state of PCR %s (%s) signed by key %x, written to %s\n", slotview.JoinPCRs(state.PCRs), s.Bank, state.KeyFingerprint[:8], s.Out)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.Key, "key", "", "the operator's private key, in PEM: RSA or ECDSA")
	f.StringVar(&s.Cluster, "cluster-id", "", "the cluster ID to sign for, as kleidi status shows it")
	f.Uint64Var(&s.Generation, "generation", 1, "adding a later generation revokes the boot states of the earlier ones")
	f.BoolVar(&s.Systemd, "systemd", false, "sign only PCR 11, as systemd does: for any cluster, and without generations")
	f.StringVar(&s.Logs.Firmware, "event-log", "", "saved event log of the firmware")
	f.StringVar(&s.Logs.Userspace, "userspace-event-log", "", "saved event log of systemd")
	f.StringVar(&s.Bank, "bank", "sha256", "PCR bank: sha256 or sha384")
	f.IntSliceVar(&s.Pcrs, "pcrs", nil, "the PCRs to sign (default: chosen by how the machine boots, without 7 and 14)")
	f.StringVar(&s.What, "what", "", "a note, only for display")
	f.StringVar(&s.Out, "out", "", "new file to write to; standard output if empty")
	registerNextFiles(cmd, &s.Files)
	a.completeFlag(cmd, "cluster-id", completion.ClusterID)
	completeOneOf(cmd, "bank", "sha256", "sha384")
	required(cmd, "key", "event-log")
	fileFlags(cmd, "key", "event-log")
	return cmd
}

func newStateAdd(a *app) *cobra.Command {
	var key string
	var systemd bool
	cmd := &cobra.Command{
		Use:   "add (FILE --public-key FILE | --systemd)",
		Short: "Open the keyring in boot states that a key signed",
		Long: `Open the keyring in the signed boot states of a file. The first boot states of a key
make a slot for everything that the key signs from then on. Boot states of a later
generation revoke all boot states of the earlier one. With --systemd, add the boot
states in the running UKI.`,
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
			if req.States, err = files.Read(file, bootstate.MaxSize); err != nil {
				return fmt.Errorf("add: %w", err)
			}
			if req.PublicKey, err = files.Read(key, files.MaxPublicKey); err != nil {
				return fmt.Errorf("add: %w", err)
			}
			return operateAndShow(cmd, a, operation.AddBootStates, req)
		},
	}
	cmd.Flags().StringVar(&key, "public-key", "", "the key that signed, in PEM (openssl pkey -pubout)")
	cmd.Flags().BoolVar(&systemd, "systemd", false, "use "+systemdStates+" and "+systemdKey)
	return cmd
}

func newStateList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "Show the signed boot states, and which of them have a slot",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			r, err := operate(cmd.Context(), a, operation.Status, admin.StatusRequest{})
			if err != nil {
				return err
			}
			states, err := inspect.ListStates(append([]string{cfg.BootStates()}, cfg.TPM.BootStates...), r)
			if err != nil {
				return files.HintRoot(fmt.Errorf("list: %w", err))
			}
			return show(cmd, a, states, text.BootStates)
		},
	}
}

func newStateRevoke(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke KEY",
		Short: "Revoke the boot states of a key, by the beginning of its fingerprint",
		Long: `Remove the slot of a key and end its epoch: from then on the TPM refuses the slot and
every kept copy of it. To revoke only some of the boot states of a key, sign the others
for a later generation, and add them.`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeArgument(completion.Signers),
		RunE: func(cmd *cobra.Command, args []string) error {
			return operateAndShow(cmd, a, operation.RevokeBootStates, admin.RevokeBootStatesRequest{Key: args[0]})
		},
	}
}
