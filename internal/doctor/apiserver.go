package doctor

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/internal/kubeadm"
)

// manifest finds kube-apiserver's manifest only if kubeadm runs kube-apiserver.
func manifest(n *Node) []diagnosis.Finding {
	b, err := n.read(n.Manifest)
	if err != nil {
		return diagnosis.NotChecked("%v: something other than kubeadm starts kube-apiserver", err)
	}
	applied, err := kubeadm.Patch{EncryptionConfig: n.EncryptionConfig, Socket: n.Config.KMS.Socket}.Applied(b)
	if err != nil {
		return diagnosis.Found("manifest/refused", "kleidi encryption-config   # put its provider first in the file that the manifest names, and give doctor that file with --encryption-config", "%s: %v", n.Manifest, err)
	}
	if applied {
		return nil
	}
	return diagnosis.Found("manifest/unpatched", n.patch(), "%s does not name kleidi's EncryptionConfiguration, or does not mount it and the folder of the socket", n.Manifest)
}

// patch returns the command that repairs the manifest.
func (n *Node) patch() string {
	command := "kleidi kubeadm patch --apply --encryption-config " + n.EncryptionConfig
	if n.Manifest != kubeadm.Manifest {
		command += " --manifest " + n.Manifest
	}
	return command
}

// distribution returns the commands of the node's distribution.
func (n *Node) distribution() diagnosis.Distribution { return diagnosis.DistributionOf(n.exists) }

// pod is the part of kube-apiserver's manifest that doctor reads.
type pod struct {
	Spec struct {
		SecurityContext securityContext `yaml:"securityContext"`
		Containers      []struct {
			SecurityContext securityContext `yaml:"securityContext"`
		} `yaml:"containers"`
	} `yaml:"spec"`
}

type securityContext struct {
	RunAsUser  *int `yaml:"runAsUser"`
	RunAsGroup *int `yaml:"runAsGroup"`
}

// apiserverUser returns the user and the group of kube-apiserver, as its manifest says.
func (n *Node) apiserverUser() (uid, gid int, err error) {
	b, err := n.read(n.Manifest)
	if err != nil {
		return 0, 0, err
	}
	var p pod
	if err := yaml.Unmarshal(b, &p); err != nil {
		return 0, 0, err
	}
	contexts := []securityContext{p.Spec.SecurityContext}
	for _, c := range p.Spec.Containers[:min(1, len(p.Spec.Containers))] {
		contexts = append(contexts, c.SecurityContext)
	}
	for _, c := range contexts { // the container's own context comes last, and wins
		if c.RunAsUser != nil {
			uid = *c.RunAsUser
		}
		if c.RunAsGroup != nil {
			gid = *c.RunAsGroup
		}
	}
	return uid, gid, nil
}

// sockets compares the socket and its folder with kube-apiserver's user.
func sockets(n *Node) (all []diagnosis.Finding) {
	uid, gid, err := n.apiserverUser()
	if err != nil {
		return diagnosis.NotChecked("the user of kube-apiserver is not known: %v", err)
	}
	if uid == 0 {
		return nil // root can open every socket, and is always allowed
	}
	c := n.Config.KMS
	if c.SocketUID != uid && !slices.Contains(c.AllowedUIDs, uint32(uid)) {
		all = diagnosis.Found("sockets/uid", fmt.Sprintf("systemctl restart kleidi   # after kms.socketUID: %d is in the configuration", uid), "kube-apiserver runs as UID %d, which kms.socketUID and kms.allowedUIDs do not name", uid)
	} else if mode := fs.FileMode(c.SocketMode); c.SocketUID != uid && (c.SocketGID != gid || mode&0o020 == 0) {
		all = diagnosis.Found("sockets/uid", fmt.Sprintf("systemctl restart kleidi   # after kms.socketUID: %d is in the configuration", uid), "kube-apiserver runs as UID %d and GID %d, and kms.socketMode %04o does not let it connect", uid, gid, mode)
	}
	for dir := filepath.Dir(c.Socket); dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		if st, err := os.Stat(n.path(dir)); err == nil && st.Mode().Perm()&0o001 == 0 {
			all = append(all, diagnosis.Found("sockets/folder", "chmod o+x "+dir, "%s has mode %04o, and kube-apiserver runs as UID %d", dir, st.Mode().Perm(), uid)...)
		}
	}
	return all
}

const (
	// oldest is the oldest minor version of kube-apiserver 1 in which KMS v2 is stable.
	oldest = 29
	// maxStale is how long a kube-apiserver may go without a Status of the plugin, which it
	// asks for every minute.
	maxStale = 5 * time.Minute
)

// apiserver checks what the running kube-apiserver reports about itself.
func apiserver(n *Node) (all []diagnosis.Finding) {
	api := n.API.Value
	if api == nil {
		return diagnosis.NotChecked("%s", n.API.Why)
	}
	var major, minor int
	if _, err := fmt.Sscanf(api.Version, "v%d.%d", &major, &minor); err != nil {
		all = diagnosis.NotChecked("kube-apiserver's version is %q", api.Version)
	} else if major == 1 && minor < oldest {
		all = diagnosis.Found("kube-apiserver/old", n.distribution().Upgrade, "kube-apiserver is version %s", api.Version)
	}
	m := api.Metrics.Value
	if m == nil {
		return append(all, diagnosis.NotChecked("kube-apiserver's metrics: %s", api.Metrics.Why)...)
	}
	const see = "kubectl get --raw /metrics | grep apiserver_envelope_encryption"
	calls, failed := 0.0, []string{}
	for code, count := range m.Calls {
		calls += count
		if code != "OK" && count > 0 {
			failed = append(failed, fmt.Sprintf("%g with %s", count, code))
		}
	}
	slices.Sort(failed)
	if calls == 0 {
		all = append(all, diagnosis.Found("kube-apiserver/never-called", cmp.Or(n.distribution().Configure, n.patch()), "kube-apiserver has never called kleidi's provider")...)
	} else if !m.Status.IsZero() && n.Now.Sub(m.Status) > maxStale {
		all = append(all, diagnosis.Found("kube-apiserver/stale", "systemctl restart kleidi   # then "+see, "kube-apiserver last saw kleidi's key ID at %s", m.Status.UTC().Format(time.RFC3339))...)
	}
	if len(failed) > 0 {
		all = append(all, diagnosis.Found("kube-apiserver/errors", see, "kube-apiserver counts failed calls to kleidi: %s", strings.Join(failed, ", "))...)
	}
	if m.Invalid > 0 {
		all = append(all, diagnosis.Found("kube-apiserver/key-ids", see, "kube-apiserver has refused %g key IDs of kleidi", m.Invalid)...)
	}
	if b, err := n.read(n.EncryptionConfig); err == nil && m.ConfigHash != "" && m.ConfigHash != fmt.Sprintf("sha256:%x", sha256.Sum256(b)) {
		all = append(all, diagnosis.Found("kube-apiserver/other-configuration", n.distribution().Restart, "the running kube-apiserver uses another EncryptionConfiguration (%s) than %s", m.ConfigHash, n.EncryptionConfig)...)
	}
	return all
}
