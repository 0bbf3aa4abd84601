package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

// Versions of the components that kubeadm 1.37.1 starts.
const (
	kubeVersion = "v1.37.1"
	etcdTag     = "3.6.16-0"
	pauseTag    = "3.10.2"
)

// kubernetes names the programs of a control-plane node in e2e/servers.
var kubernetes = []string{
	"kubeadm-1.37", "kube-apiserver-1.37", "kube-controller-manager-1.37", "etcd", "pause",
	"kubernetes-1.37/kubelet", "kubernetes-1.37/kubectl", "kubernetes-1.37/kube-scheduler",
}

// KubeNode is a machine with containerd, kubelet, kubeadm and kubectl, and with the images of
// a control plane: a node before kubeadm init or join. kleidi is not installed.
type KubeNode struct {
	*nspawn.Machine
	t testing.TB
	s KubeNodeSetup
	// programs are mounted from this machine, by their names.
	programs map[string]string
}

// KubeNodeSetup describes a node.
type KubeNodeSetup struct {
	Name string
	// Address is the node's IP address in its network of 24 bits.
	Address string
	// Network holds the commands that connect the interface node0, which then gets the
	// address and the default route. If empty, the network ends in the node.
	Network string
	// Args are further flags of systemd-nspawn.
	Args []string
}

// network returns the commands that connect the node.
func (s KubeNodeSetup) network() string {
	return "ip link set lo up\n" + s.Network + fmt.Sprintf(`
ip link set node0 up
ip addr add %s/24 dev node0
ip route add default via %s.254 dev node0
echo 1 >/proc/sys/net/ipv4/ip_forward
`, s.Address, s.Address[:strings.LastIndex(s.Address, ".")])
}

// NewKubeNode boots a node. Its TPM has booted a unified kernel image.
func NewKubeNode(t testing.TB, s KubeNodeSetup) *KubeNode {
	t.Helper()
	built, err := Built(kubernetes...)
	if err != nil {
		t.Fatal(err)
	}
	if s.Network == "" {
		// a bridge needs a port to be up; the module of "dummy" may be missing
		s.Network = "ip link add node0 type bridge; ip link add port0 type veth peer name port1; ip link set port0 master node0 up; ip link set port1 up"
	}
	// kubelet and runc want calls that nspawn's filter refuses
	args := []string{"--capability=all", "--bind=/dev/kmsg"}
	programs := map[string]string{}
	for _, path := range built {
		if name := filepath.Base(path); slices.Contains([]string{"kubeadm", "kubelet", "kubectl"}, name) {
			programs[name] = path
			args = append(args, "--bind-ro="+path+":/usr/local/bin/"+name)
		}
	}
	n := &KubeNode{t: t, s: s, programs: programs, Machine: nspawn.New(t, nspawn.Setup{
		Name: s.Name, Archive: "node.tar", Args: append(args, s.Args...), Env: []string{"SYSTEMD_SECCOMP=0"},
	})}
	n.Write("etc/hostname", s.Name+"\n")
	n.Write("etc/hosts", "127.0.0.1 localhost\n"+s.Address+" "+s.Name+"\n")
	n.Write("etc/containerd/config.toml", containerdConfig)
	n.Write("etc/systemd/system/containerd.service.d/node.conf", "[Unit]\nRequires=node.service\nAfter=node.service\n[Service]\nOOMScoreAdjust=0\n")
	n.Write("etc/systemd/system/kubelet.service", kubeletUnit)
	n.Write("etc/systemd/system/node.service", nodeUnit)
	n.Write("usr/local/sbin/node", "#!/bin/sh\nset -eu\n"+containerSettings+s.network())
	n.Write("root/kubeadm.yaml", n.Config("", ""))
	nspawn.Run(t, "chmod", "0755", n.Path("usr/local/sbin/node"))
	n.Boot()
	n.Sh("systemctl enable -q kubelet; systemctl is-active containerd")
	for _, i := range images(built) {
		n.Import(i)
	}
	return n
}

// LeaveContainer shuts the node down, and makes its root folder one that a machine can boot:
// with the programs that were mounted, and without the settings of a container.
func (n *KubeNode) LeaveContainer() {
	n.t.Helper()
	n.PowerOff()
	for name, path := range n.programs {
		nspawn.Run(n.t, "install", path, n.Path("usr/local/bin/"+name))
	}
	n.Write("usr/local/sbin/node", "#!/bin/sh\nset -eu\n"+n.s.network())
}

// With returns the same node for a subtest.
func (n *KubeNode) With(t testing.TB) *KubeNode {
	return &KubeNode{Machine: n.Machine.With(t), t: t, s: n.s, programs: n.programs}
}

// images lists the images of a control plane, under the names that kubeadm wants.
func images(built map[string]string) (all []Image) {
	tags := map[string]string{"kube-apiserver": kubeVersion, "kube-controller-manager": kubeVersion, "kube-scheduler": kubeVersion, "etcd": etcdTag, "pause": pauseTag}
	for _, name := range kubernetes {
		program := filepath.Base(built[name])
		if tag, ok := tags[program]; ok {
			i := Image{Reference: "registry.k8s.io/" + program + ":" + tag, Binary: built[name], Path: "/usr/local/bin/" + program}
			if program == "pause" {
				i.Entrypoint = []string{i.Path}
			}
			all = append(all, i)
		}
	}
	return all
}

// Import gives an image to the node's containerd.
func (n *KubeNode) Import(i Image) {
	n.t.Helper()
	r, w := io.Pipe()
	go func() { w.CloseWithError(i.Write(w)) }()
	if out, err := n.With(n.t).Input(r, "ctr -n k8s.io images import --digests -"); err != nil {
		n.t.Fatalf("%s: %v\n%s", i.Reference, err, out)
	}
}

// patient are the time limits of kubeadm, for a busy machine.
const patient = `timeouts:
  controlPlaneComponentHealthCheck: 10m0s
  kubeletHealthCheck: 10m0s
  kubernetesAPICall: 10m0s
  etcdAPICall: 10m0s
  tlsBootstrap: 10m0s
`

// Config returns a configuration file for kubeadm init. The further keys are added to
// InitConfiguration, and to ClusterConfiguration.
func (n *KubeNode) Config(initConfiguration, clusterConfiguration string) string {
	return fmt.Sprintf(kubeadmConfig, n.s.Address, n.s.Name, initConfiguration, clusterConfiguration)
}

const kubeadmConfig = `apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
` + patient + `localAPIEndpoint:
  advertiseAddress: %[1]s
nodeRegistration:
  name: %[2]s
  criSocket: unix:///run/containerd/containerd.sock
  imagePullPolicy: Never
  taints: []
  # the checks of a kernel's modules and cgroups, in a container
  ignorePreflightErrors: [SystemVerification]
# both need images that are not here
skipPhases: [addon/coredns, addon/kube-proxy]
%[3]s
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: ` + kubeVersion + `
imageRepository: registry.k8s.io
etcd:
  local:
    imageTag: ` + etcdTag + `
    extraArgs:
      - {name: unsafe-no-fsync, value: "true"}
      - {name: heartbeat-interval, value: "300"}
      - {name: election-timeout, value: "3000"}
networking:
  podSubnet: 10.98.0.0/16
%[4]s
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
# the disk of a test machine may be nearly full: nothing is evicted for it
evictionHard:
  memory.available: 10Mi
  nodefs.available: 0%%
  nodefs.inodesFree: 0%%
  imagefs.available: 0%%
  imagefs.inodesFree: 0%%
imageMinimumGCAge: 24h
`

// Without CAP_SYS_RESOURCE no process may lower its OOM score.
const containerdConfig = `version = 2
[debug]
  level = "warn"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:` + pauseTag + `"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
`

// kubelet never starts without node.service.
const kubeletUnit = `[Unit]
Description=kubelet
Wants=containerd.service
Requires=node.service
After=containerd.service node.service
StartLimitIntervalSec=0
[Service]
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
ExecStart=/usr/local/bin/kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf --config=/var/lib/kubelet/config.yaml $KUBELET_KUBEADM_ARGS
Restart=always
RestartSec=2
[Install]
WantedBy=multi-user.target
`

const nodeUnit = `[Unit]
Description=Network and kernel settings of a node in a container
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/node
[Install]
WantedBy=multi-user.target
`

// kubelet sets kernel settings that belong to the whole machine, not to the container. Here
// it finds files of its own in their place, with the values that it wants.
const containerSettings = `mkdir -p /run/settings
pretend() { # setting, value
	file=/run/settings/${1##*/}
	echo "$2" >"$file"
	mount --bind "$file" "/proc/sys/$1"
}
pretend vm/overcommit_memory 1
pretend vm/panic_on_oom 0
pretend kernel/panic 10
pretend kernel/panic_on_oops 1
pretend kernel/keys/root_maxkeys 1000000
pretend kernel/keys/root_maxbytes 25000000

# Where the machine has version 1 of cgroups, nspawn mounts all controllers read-only. They
# are those of the container's own groups.
if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ]; then
	for c in $(awk '!/^#/ { print $1 }' /proc/cgroups); do
		! mountpoint -q "/sys/fs/cgroup/$c" || mount -o remount,bind,rw "/sys/fs/cgroup/$c"
	done
fi

`

// CopyPackage makes kleidi's Debian package, and copies it into /root.
func (n *KubeNode) CopyPackage() {
	n.t.Helper()
	const deb = "kleidi_1.0.0_amd64.deb"
	n.Copy(filepath.Join(nspawn.Package(n.t, "v1.0.0"), deb), "root/"+deb)
}

// Copy copies a file of this machine into the node.
func (n *KubeNode) Copy(from, to string) {
	n.t.Helper()
	if out, err := exec.Command("cp", from, n.Path(to)).CombinedOutput(); err != nil {
		n.t.Fatalf("%v: %s", err, out)
	}
}

// Stored returns the raw values below a prefix in the node's etcd, by key.
func (n *KubeNode) Stored(prefix string) map[string][]byte {
	n.t.Helper()
	pki := func(file string) string { return n.Path("etc/kubernetes/pki/" + file) }
	certificate, err := tls.LoadX509KeyPair(pki("apiserver-etcd-client.crt"), pki("apiserver-etcd-client.key"))
	if err != nil {
		n.t.Fatal(err)
	}
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM([]byte(n.Read("etc/kubernetes/pki/etcd/ca.crt")))
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: n.Dial, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{certificate}, RootCAs: authorities},
	}}
	var values map[string][]byte
	node.Eventually(n.t, 10*time.Minute, "etcd on "+n.s.Name+" answers", func() (err error) {
		values, err = get(client, "https://127.0.0.1:2379", prefix)
		return err
	})
	return values
}

// TryKubectl runs kubectl as the administrator.
func (n *KubeNode) TryKubectl(args string) (string, error) {
	return n.Try("kubectl --kubeconfig=/etc/kubernetes/admin.conf --request-timeout=60s " + args)
}

// Kubectl runs kubectl as the administrator. It must succeed.
func (n *KubeNode) Kubectl(args string) string {
	n.t.Helper()
	out, err := n.TryKubectl(args)
	if err != nil {
		n.t.Fatalf("kubectl %s: %v\n%s", args, err, out)
	}
	return out
}

// StopPod moves a static pod's manifest away, and returns when its program has ended. The
// manifest and the program have the pod's name.
func (n *KubeNode) StopPod(name string) {
	n.t.Helper()
	n.Sh("mkdir -p /root/stopped; mv " + manifests + name + ".yaml /root/stopped/")
	node.Eventually(n.t, 10*time.Minute, name+" has ended", func() error {
		// the kernel keeps 15 letters of a name
		if out, err := n.Try("pgrep -x " + name[:min(len(name), 15)]); err == nil {
			return fmt.Errorf("process %s", out)
		}
		return nil
	})
}

// StartPod moves the manifest back.
func (n *KubeNode) StartPod(name string) {
	n.t.Helper()
	n.Sh("mv /root/stopped/" + name + ".yaml " + manifests)
}

const manifests = "/etc/kubernetes/manifests/"

// Readme returns README's six commands, without sudo and the comments.
func Readme(t testing.TB) (commands []string) {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "## Six commands")
	_, block, _ := strings.Cut(section, "```sh\n")
	block, _, _ = strings.Cut(block, "```")
	for line := range strings.Lines(block) {
		command, _, _ := strings.Cut(line, "#")
		commands = append(commands, strings.TrimPrefix(strings.TrimSpace(command), "sudo "))
	}
	if len(commands) != 6 {
		t.Fatalf("README has %d commands: %q", len(commands), commands)
	}
	return commands
}
