package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/kubeadm"
	"github.com/beezy-dev/kleidi/seal"
)

func newKubeadm(a *app) *cobra.Command {
	return group("kubeadm", "Connect the kube-apiserver that kubeadm runs", "",
		newKubeadmPatch(a))
}

// kubeadmPatch is the result of kleidi kubeadm patch.
type kubeadmPatch struct {
	Operations []kubeadm.Operation `json:"operations"`
	// File is the patch or the manifest that was written. It is empty if nothing had to
	// change.
	File string `json:"file,omitempty"`
}

type kubeadmFlags struct {
	encryptionConfig, manifest, dir string
	apply, revert, yes, wait        bool
	timeout                         time.Duration
}

func newKubeadmPatch(a *app) *cobra.Command {
	var f kubeadmFlags
	cmd := &cobra.Command{
		Use:   "patch",
		Short: "Give kube-apiserver kleidi's EncryptionConfiguration and socket",
		Long: `Print the patch by which kubeadm gives kube-apiserver the EncryptionConfiguration and
the folder of kleidi's socket. It leaves out what the present manifest mounts
under another name, since kubeadm mounts that again. With --dir, write it into a folder
for kubeadm's --patches (kubeadm init, join and upgrade), which a configuration file names
as patches.directory in InitConfiguration and JoinConfiguration. With --apply, change the
manifest of the running kube-apiserver, and wait until kubelet has restarted it and it is
ready: until then it stores objects as before. kubeadm upgrade writes a new manifest, so
use --dir as well. With --revert, take that change back; kube-apiserver keeps the file if
other providers encrypt with it.`,
		Example: `  kleidi kubeadm patch --dir /etc/kubernetes/patches
  kleidi kubeadm patch --apply
  kleidi kubeadm patch --revert`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if changed := cmd.Flags().Changed; !f.apply && changed("wait") || !(f.apply && f.wait) && changed("timeout") {
				return seal.Errorf("", "leave it out", "kubeadm patch: only --apply waits, unless --wait=false is given, so --wait or --timeout has no effect")
			}
			return a.kubeadmPatch(cmd, f)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.encryptionConfig, "encryption-config", kubeadm.DefaultEncryptionConfig, "the EncryptionConfiguration that kube-apiserver reads")
	flags.StringVar(&f.dir, "dir", "", "write the patch into this folder, for kubeadm's --patches")
	flags.BoolVar(&f.apply, "apply", false, "change the manifest of this node's kube-apiserver")
	flags.BoolVar(&f.wait, "wait", true, "with --apply, wait until kube-apiserver is ready with the change")
	flags.DurationVar(&f.timeout, "timeout", 10*time.Minute, "how long --apply waits")
	flags.BoolVar(&f.revert, "revert", false, "take the change back")
	flags.StringVar(&f.manifest, "manifest", kubeadm.Manifest, "the manifest of kube-apiserver")
	flags.BoolVar(&f.yes, "yes", false, "revert although the EncryptionConfiguration names kleidi: objects that are still encrypted become unreadable")
	cmd.MarkFlagsMutuallyExclusive("dir", "apply", "revert")
	_ = cmd.MarkFlagDirname("dir")
	_ = cmd.MarkFlagFilename("manifest", "yaml")
	_ = cmd.MarkFlagFilename("encryption-config", "yaml")
	return cmd
}

// kubeadmPatch prints the patch unless a flag names a place for it. An --apply or --revert
// that finds nothing to change writes no file, since each write restarts kube-apiserver.
func (a *app) kubeadmPatch(cmd *cobra.Command, f kubeadmFlags) error {
	c, err := a.config()
	if err != nil {
		return err
	}
	if !filepath.IsAbs(f.encryptionConfig) {
		return errors.New("--encryption-config must be an absolute path: it is mounted into kube-apiserver")
	}
	p := kubeadm.Patch{EncryptionConfig: f.encryptionConfig, Socket: c.KMS.Socket}
	operations, err := p.OperationsFor(f.manifest)
	if f.revert {
		operations, err = p.Operations(nil)
	}
	if err != nil {
		return files.HintRoot(fmt.Errorf("kubeadm patch: %w", err))
	}
	result := kubeadmPatch{Operations: operations}
	text, err := kubeadm.YAML(operations)
	if err != nil {
		return err
	}
	changed, kept, next := true, false, ""
	switch {
	case f.dir != "":
		result.File = filepath.Join(f.dir, kubeadm.PatchName)
		err, next = files.WriteOver(result.File, text), "name the folder in kubeadm's --patches or, with --config, in patches.directory of InitConfiguration and JoinConfiguration"
	case f.apply:
		result.File, next = f.manifest, "rewrite the stored objects, once every kube-apiserver of the cluster has the change: kleidi migrate"
		if !f.wait {
			next = "kubelet restarts kube-apiserver; then rewrite the stored objects: kleidi migrate"
			changed, err = p.ApplyFile(f.manifest)
			break
		}
		changed, err = p.ApplyAndAwait(cmd.Context(), f.manifest, f.timeout, func(m string) { fmt.Fprintln(cmd.ErrOrStderr(), "[kubeadm patch] waiting:", m) })
	case f.revert:
		result.File, next = f.manifest, "kubelet restarts kube-apiserver"
		changed, kept, err = p.RevertFile(f.manifest, f.yes)
		if kept {
			next = "kubelet restarts kube-apiserver, which keeps " + f.encryptionConfig + ": other providers encrypt with it"
		}
	}
	if err != nil {
		return files.HintRoot(fmt.Errorf("kubeadm patch: %w", err))
	}
	if !changed {
		result.File = ""
	}
	return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
		switch {
		case !changed && f.apply && f.wait:
			fmt.Fprintf(w, "nothing was changed: %s has the change, and kube-apiserver is ready with it\nnext: %s\n", f.manifest, next)
		case !changed:
			fmt.Fprintf(w, "nothing was changed: %s needs no change\n", f.manifest)
		case next == "":
			_, _ = w.Write(text)
		default:
			fmt.Fprintf(w, "%s written\nnext: %s\n", result.File, next)
		}
	})
}
