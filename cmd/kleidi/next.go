package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/predict"
)

// nextFiles are the files of the next boot, and of the running one, as flags.
type nextFiles struct {
	next, running           bootFiles
	dbx                     string
	commandLine             string
	runningCommandLine      string
	hasLine, hasRunningLine bool
}

type bootFiles struct{ uki, kernel, initrd, grubConfig string }

func registerNextFiles(cmd *cobra.Command, f *nextFiles) {
	flags := cmd.Flags()
	for prefix, files := range map[string]*bootFiles{"next": &f.next, "running": &f.running} {
		of := "of the " + prefix + " boot"
		flags.StringVar(&files.uki, prefix+"-uki", "", "unified kernel image "+of)
		flags.StringVar(&files.kernel, prefix+"-kernel", "", "kernel "+of+", with GRUB or the kernel's EFI stub")
		flags.StringVar(&files.initrd, prefix+"-initrd", "", "initrd "+of+", with GRUB or the kernel's EFI stub")
		flags.StringVar(&files.grubConfig, prefix+"-grub-config", "", "grub.cfg "+of)
	}
	flags.StringVar(&f.commandLine, "next-cmdline", "", "kernel command line of the next boot, with GRUB or the kernel's EFI stub")
	flags.StringVar(&f.runningCommandLine, "running-cmdline", "", "kernel command line of the running boot, as in /proc/cmdline")
	flags.StringVar(&f.dbx, "next-dbx", "", "next content or update of Secure Boot's dbx (dbxupdate_x64.bin)")
}

// nextFilesGiven reports whether a flag of the next boot was given.
func nextFilesGiven(cmd *cobra.Command, f *nextFiles) bool {
	f.hasLine, f.hasRunningLine = cmd.Flags().Changed("next-cmdline"), cmd.Flags().Changed("running-cmdline")
	return f.next != bootFiles{} || f.dbx != "" || f.hasLine
}

func (f *nextFiles) change() (c predict.Change, err error) {
	read := func(to *[]byte, path string) {
		if path == "" || err != nil {
			return
		}
		*to, err = readFile(path, predict.MaxFile)
	}
	for _, b := range []struct {
		paths bootFiles
		to    *predict.Files
	}{{f.next, &c.Next}, {f.running, &c.Running}} {
		read(&b.to.UKI, b.paths.uki)
		read(&b.to.Kernel, b.paths.kernel)
		read(&b.to.Initrd, b.paths.initrd)
		read(&b.to.GRUBConfig, b.paths.grubConfig)
	}
	read(&c.Dbx, f.dbx)
	if f.hasLine {
		c.Next.CommandLine = &f.commandLine
	}
	if f.hasRunningLine {
		line := strings.TrimSuffix(f.runningCommandLine, "\n")
		c.Running.CommandLine = &line
	}
	return c, err
}

// prediction is what the next boot will be.
type prediction struct {
	state tpm.BootState
	log   *eventlog.Log
	moved []int // PCRs that differ from the running boot
}

// predict computes the next boot from the attested running one and the files.
func (n *node) predict(ctx context.Context, change predict.Change) (*prediction, error) {
	pcrs, err := n.gate.ChoosePCRs()
	if err != nil {
		return nil, err
	}
	quoted := append(slices.Clone(pcrs), 7) // Secure Boot decides what else is measured
	slices.Sort(quoted)
	running, err := n.gate.AttestPCRs(ctx, slices.Compact(quoted))
	if err != nil {
		return nil, err
	}
	if err := n.gate.CheckPhase(running.Log); err != nil {
		return nil, err
	}
	change.PCRs = n.cfg.TPM.PCRs
	p := &prediction{}
	if p.log, err = predict.Predict(running.Log, change); err != nil {
		return nil, err
	}
	if len(n.cfg.TPM.PCRs) == 0 {
		pcrs = p.log.BootType().PCRs(p.log)
	}
	if p.state, err = n.gate.Next(p.log, pcrs); err != nil {
		return nil, err
	}
	now, err := running.Log.Replay(n.cfg.Bank())
	if err != nil {
		return nil, err
	}
	for _, i := range pcrs {
		if !bytes.Equal(now[i], p.state.Values[i]) {
			p.moved = append(p.moved, i)
		}
	}
	return p, n.anchorFollows(now, p.log)
}

// anchorFollows refuses a next boot that could not read the anchor in the TPM.
func (n *node) anchorFollows(now eventlog.PCRs, next *eventlog.Log) error {
	if n.cfg.Anchor.Store != config.AnchorTPM {
		return nil
	}
	then, err := next.Replay(n.cfg.Bank())
	if err != nil {
		return err
	}
	for _, i := range n.cfg.Anchor.PCRs {
		if !bytes.Equal(now[i], then[i]) {
			return fmt.Errorf("PCR %d changes, and the anchor in the TPM is bound to it: the next boot will need kleidi recover with the recovery identity; see docs/threat-model.md", i)
		}
	}
	return nil
}

// allowNext has the boot policy allow the predicted boot, too. It says what it did,
// and how to take it back.
func (n *node) allowNext(ctx context.Context, next *eventlog.Log) (did string, undo func() error, err error) {
	path := n.cfg.TPM.BootPolicy
	undo = func() error { return nil }
	if path == "" {
		return "", undo, nil
	}
	file := store.NewFile(path)
	b, version, err := file.Load(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("boot policy: %w", err)
	}
	p, err := bootpolicy.Parse(b)
	if err != nil {
		return "", nil, fmt.Errorf("boot policy %s:\n%w", path, err)
	}
	wider, err := p.AlsoAllow(next)
	if err != nil {
		return "", nil, fmt.Errorf("%s can't allow the next boot: %w", path, err)
	}
	if bytes.Equal(wider.Marshal(), p.Marshal()) {
		return "", undo, nil
	}
	version, err = file.Save(ctx, wider.Marshal(), version)
	if err != nil {
		return "", nil, fmt.Errorf("boot policy: %w", err)
	}
	undo = func() error {
		_, err := file.Save(context.WithoutCancel(ctx), b, version)
		return err
	}
	return "the boot policy " + path + " allows it as well", undo, nil
}

// sealToNext predicts the next boot and, unless reseal is nil, has the boot policy allow
// it and reseal seal the KEK to it.
func (n *node) sealToNext(ctx context.Context, change predict.Change, reseal func(*admin.BootState) (admin.KeyringState, error)) (*nextResult, error) {
	p, err := n.predict(ctx, change)
	if err != nil {
		if _, ok := errors.AsType[*predict.Refusal](err); ok {
			return nil, err
		}
		return nil, requireRoot(err)
	}
	r := &nextResult{Bank: n.cfg.TPM.Bank, PCRs: map[int]string{}, Moved: p.moved, BootType: string(p.log.BootType())}
	for i, v := range p.state.Values {
		r.PCRs[i] = fmt.Sprintf("%x", v)
	}
	if reseal == nil {
		return r, nil
	}
	// First the boot policy: a slot for a boot that it refuses would be of no use.
	allowed, undo, err := n.allowNext(ctx, p.log)
	if err != nil {
		return nil, err
	}
	s, err := reseal(&admin.BootState{Bank: n.cfg.TPM.Bank, PCRs: p.state.Values, Record: p.state.Record})
	if err != nil {
		return nil, errors.Join(err, undo())
	}
	if allowed != "" {
		s.Changes = append(s.Changes, allowed)
	}
	r.Keyring = &s
	return r, nil
}

// nextResult is what a reseal to the next boot shows.
type nextResult struct {
	BootType string              `json:"bootType"`
	Bank     string              `json:"bank"`
	PCRs     map[int]string      `json:"pcrs"`
	Moved    []int               `json:"moved"`
	Keyring  *admin.KeyringState `json:"keyring,omitempty"`
}

func (a *app) resealNext(cmd *cobra.Command, f *nextFiles, req admin.ResealRequest, dryRun bool) (*nextResult, error) {
	n, err := a.node()
	if err != nil {
		return nil, err
	}
	defer n.close()
	change, err := f.change()
	if err != nil {
		return nil, err
	}
	if dryRun {
		return n.sealToNext(cmd.Context(), change, nil)
	}
	return n.sealToNext(cmd.Context(), change, func(next *admin.BootState) (admin.KeyringState, error) {
		req.Next = next
		return operate(cmd.Context(), a, admin.Reseal, req, unlocked((*node).anyReseal))
	})
}
