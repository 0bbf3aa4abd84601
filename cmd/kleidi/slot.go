package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

func newSlot(a *app) *cobra.Command {
	return group("slot", "List, add, test, rewrap and remove slots, the ways to open the KEK", `The keyring holds the KEK once for each way to open it. It has a slot for this
machine's TPM. You can add slots for a key in a PKCS#11 token, for a key in Vault or
OpenBao, for another KMS v2 plugin, and for recovery identities.`,
		newSlotList(a), newSlotAdd(a), newSlotTest(a), newSlotRewrap(a), newSlotRemove(a), newSlotForgetCopies(a))
}

func newSlotList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "Show the slots",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := operate(cmd.Context(), a, operation.Status, admin.StatusRequest{})
			if err == nil && r.Problem != nil && r.Problem.Cause == seal.CauseKeyringMissing {
				err = r.Problem.Err()
			}
			if err != nil {
				return err
			}
			return show(cmd, a, r.Slots, text.Slots)
		},
	}
}

func newSlotAdd(a *app) *cobra.Command {
	var req admin.AddSlotRequest
	cmd := &cobra.Command{
		Use:               "add pkcs11|vault|kms-plugin|recovery",
		ValidArgsFunction: cobra.FixedCompletions([]string{"pkcs11", "vault", "kms-plugin", "recovery"}, cobra.ShellCompDirectiveNoFileComp),
		Short:             "Wrap the KEK with another wrapper from the configuration",
		Example: `  kleidi slot add pkcs11 --generate-key
  kleidi slot add vault
  kleidi slot add kms-plugin
  kleidi slot add recovery --recipient age1…`,
		Args:      cobra.ExactArgs(1),
		ValidArgs: []string{seal.TypePKCS11, seal.TypeVault, seal.TypeKMSPlugin, seal.TypeRecovery},
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Type = args[0]
			if !slices.Contains(cmd.ValidArgs, req.Type) {
				return fmt.Errorf("slot add %s: want one of %s", req.Type, slotview.JoinWords(cmd.ValidArgs))
			}
			if req.GenerateKey && req.Type != seal.TypePKCS11 {
				return seal.Errorf("", "leave it out", "slot add %s: --generate-key goes with pkcs11 alone", req.Type)
			}
			if (req.Type == seal.TypeRecovery) != (len(req.Recipients) > 0) {
				return fmt.Errorf("slot add %s: --recipient goes with recovery, and recovery with --recipient age1…", req.Type)
			}
			return operateAndShow(cmd, a, operation.AddSlot, req)
		},
	}
	cmd.Flags().BoolVar(&req.GenerateKey, "generate-key", false, "first generate the key in the token: AES-256, sensitive, not extractable")
	cmd.Flags().BoolVar(&req.BreakTwoOfTwo, "break-two-of-two", false, "add the slot although one wrapper then opens the KEK alone")
	cmd.Flags().StringArrayVar(&req.Recipients, "recipient", nil, "age public key (age1…) of a recovery identity; may be repeated")
	return cmd
}

// newSlotTest returns the verb slot test. It prints every result before it fails with exit
// code 1 for the first slot that does not open. A slot for the next boot can't open yet,
// and is no failure.
func newSlotTest(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "test [NAME]...",
		Short: "Really open slots, and compare the KEK with the key ID",
		Long: `Really open slots, and compare the KEK with the key ID. Without names, the command
opens all slots that are configured on this machine. kleidi serve tests the slots of
pkcs11, vault and kms-plugin regularly, as often as unlock.selfTest says.

The command asks the running kleidi serve. Without one, each run is a separate login: a
wrong PIN counts towards the limit at which the token locks the PIN, and a wrapping
token in vault.auth.secretIDFile is used up.`,
		ValidArgsFunction: a.completeArgument(completion.SlotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := operate(cmd.Context(), a, operation.TestSlots, admin.TestSlotsRequest{Names: args})
			if err != nil {
				return err
			}
			if err := show(cmd, a, r, text.SlotTests); err != nil {
				return err
			}
			for _, s := range r.Slots {
				if !s.Opens && !s.ForNextBoot {
					return fmt.Errorf("slot %s does not open", s.Name)
				}
			}
			return nil
		},
	}
}

func newSlotRewrap(a *app) *cobra.Command {
	var req admin.RewrapSlotRequest
	cmd := &cobra.Command{
		Use:   "rewrap NAME",
		Short: "Wrap a slot again, with the newest version of its key",
		Long: `Wrap a slot again, with the newest version of its key. The key must open the present
slot: the command refuses another key with the same name, because the owner of that key
would get the KEK. With --new-key the command trusts the configured key without this
check; use it after the token or its key was replaced.`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeArgument(completion.SlotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			return operateAndShow(cmd, a, operation.RewrapSlot, req)
		},
	}
	cmd.Flags().BoolVar(&req.NewKey, "new-key", false, "trust the configured key, although it does not open the present slot")
	return cmd
}

// newSlotRemove returns the verb slot remove. It fails if the slot is gone from the
// keyring but the TPM has not revoked it yet: a script must not take such a slot for a
// closed way in.
func newSlotRemove(a *app) *cobra.Command {
	var req admin.RemoveSlotRequest
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "Remove a slot, but never the last one that can open",
		Long: `Remove a slot. A slot of this machine's TPM is also revoked: the TPM refuses kept
copies. Kept copies of other slots still open the KEK, until kleidi rotate makes a
fresh one.

NAME is the name in kleidi slot list: the type, such as recovery, if there is one slot
of that type; otherwise the type and the first digits of the slot's ID, such as
recovery-3f9a. The age1… recipient of a recovery slot is a name too. The ID is a digest
of the slot's binding. It does not change when other slots are removed or when the KEK
is rotated.`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeArgument(completion.SlotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			s, err := operate(cmd.Context(), a, operation.RemoveSlot, req)
			if err != nil {
				return err
			}
			if err := show(cmd, a, s, text.State); err != nil {
				return err
			}
			if s.Owed {
				return fmt.Errorf("slot remove %s: the slot is gone from the keyring, and copies of it are not revoked", req.Name)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&req.AcceptDataLoss, "accept-data-loss", false, "remove the last recovery slot as well: if the TPM or the machine fails, all Secrets are lost")
	return cmd
}

func newSlotForgetCopies(a *app) *cobra.Command {
	var req admin.ForgetCopiesRequest
	cmd := &cobra.Command{
		Use:   "forget-copies --ek sha256:…",
		Short: "Stop warning about kept copies for a TPM that was cleared or destroyed",
		Long: `Stop warning about copies of former slots that a TPM still opens. kleidi status names
the TPM by its endorsement key. Once kleidi runs with that TPM again, it revokes such
copies without this command. Use it only after the TPM was cleared or destroyed:
nothing checks that.`,
		Example: "  kleidi slot forget-copies --ek sha256:5d0f…",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return operateAndShow(cmd, a, operation.ForgetCopies, req)
		},
	}
	cmd.Flags().StringVar(&req.EK, "ek", "", "digest of the TPM's endorsement key, as kleidi status shows it")
	_ = cmd.MarkFlagRequired("ek") // the flag exists
	_ = cmd.RegisterFlagCompletionFunc("ek", a.complete(completion.UnrevokedEKs))
	return cmd
}
