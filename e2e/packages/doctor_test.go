package packages

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/nspawn"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// fault is planted on the machine alone. doctor must find these kinds and nothing else.
type fault struct {
	kinds []string
	plant string
	// before is what the comment of the printed command tells the operator to do first.
	before string
	// restore takes the fault back where no command can mend it. Without it, the printed
	// commands must.
	restore string
}

const (
	dropIn   = "mkdir -p /etc/systemd/system/kleidi.service.d; printf '[Service]\\n%s\\n' >/etc/systemd/system/kleidi.service.d/local.conf; systemctl daemon-reload; "
	userOf   = "sed -i 's/^spec: {/&securityContext: {runAsUser: 65533}, /' /etc/kubernetes/manifests/kube-apiserver.yaml; "
	ofNobody = "cp /root/manifest.yaml /etc/kubernetes/manifests/kube-apiserver.yaml; sed -i '/^kms:/d' /etc/kleidi/config.yaml; systemctl restart kleidi"
)

var faults = []fault{
	{kinds: []string{"unit/weakened"}, plant: fmt.Sprintf(dropIn, "NoNewPrivileges=no")},
	{kinds: []string{"unit/overridden"}, plant: "cp /usr/lib/systemd/system/kleidi.service /etc/systemd/system/kleidi.service; systemctl daemon-reload"},
	{kinds: []string{"unit/not-enabled"}, plant: "systemctl disable -q kleidi"},
	{kinds: []string{"serve/stopped"}, plant: "systemctl stop kleidi"},
	{kinds: []string{"folders/missing", "serve/stopped"}, plant: "systemctl stop kleidi; rm -r /run/kleidi"},
	{kinds: []string{"serve/no-socket"}, plant: "rm /run/kleidi/kms.sock"},
	{kinds: []string{"version/restart"}, plant: `v=$(kleidi version | grep -o 'v[0-9][^ ]*\|[0-9a-f]\{7,\}[^ ]*' | head -n 1); cp -p /usr/bin/kleidi /root/kleidi
		sed "s/$v/$(echo "$v" | tr 0-9a-f 1-9a-g)/g" /root/kleidi >/usr/bin/kleidi.new; chmod 755 /usr/bin/kleidi.new; mv /usr/bin/kleidi.new /usr/bin/kleidi`},
	{kinds: []string{"hooks/not-executable"}, plant: "chmod -x /etc/kernel/postinst.d/zzz-kleidi"},
	{kinds: []string{"hooks/not-called"}, plant: "rm /etc/kernel/postinst.d/zzz-kleidi /usr/lib/kernel/install.d/95-kleidi.install"},
	{kinds: []string{"hooks/not-called"}, plant: "rm /etc/dpkg/dpkg.cfg.d/kleidi"},
	{kinds: []string{"hooks/missing"}, plant: "rm /usr/sbin/kleidi-next-boot"},
	{kinds: []string{"next-boot/unprepared"}, plant: "mkdir -p /efi/EFI/Linux; cp /root/next.efi /efi/EFI/Linux/next.efi", restore: "rm /efi/EFI/Linux/next.efi; kleidi reseal"},
	{kinds: []string{"sockets/uid"}, plant: userOf, before: "printf 'kms: {socketUID: 65533}\\n' >>/etc/kleidi/config.yaml"},
	{kinds: []string{"sockets/folder"}, plant: userOf + "printf 'kms: {socketUID: 65533}\\n' >>/etc/kleidi/config.yaml; systemctl restart kleidi; chmod 750 /run/kleidi"},
	{kinds: []string{"root/unverified"}, plant: "umount /proc/cmdline", restore: "mount --bind /root/cmdline /proc/cmdline"},
	{kinds: []string{"memory/swap"}, plant: "printf 'memory: {lock: best-effort}\\n' >>/etc/kleidi/config.yaml; printf 'Filename Type\\n/dev/vda2 partition\\n' >/root/swaps; mount --bind /root/swaps /proc/swaps",
		restore: "umount /proc/swaps; sed -i '/^memory:/d' /etc/kleidi/config.yaml"},
	{kinds: []string{"disk/full"}, plant: "mount -t tmpfs -o size=40m,mode=0700 none /var/lib/kleidi", restore: "umount /var/lib/kleidi"},
	{kinds: []string{"disk/full"}, plant: "mount -t tmpfs -o nr_inodes=2,size=1g,mode=0700 none /var/lib/kleidi; touch /var/lib/kleidi/x", restore: "umount /var/lib/kleidi"},
	{kinds: []string{"configuration/refused"}, plant: "printf 'kmz: {}\\n' >>/etc/kleidi/config.yaml", restore: "sed -i '/^kmz:/d' /etc/kleidi/config.yaml"},
}

// doctored: on the installed node doctor finds nothing at all. Then faults are planted one
// after another. It finds each of them, and nothing else, and finds nothing again after the
// commands that it prints, as they are printed.
func doctored(t *testing.T, m *nspawn.Machine) {
	// The machine's files of the kernel are this machine's
	m.Write("root/cmdline", "BOOT_IMAGE=/vmlinuz roothash=00ff ro\n")
	m.Sh("mount --bind /root/cmdline /proc/cmdline; sed -i '/identity: {}/d' /etc/kubernetes/kleidi-encryption.yaml; cp /etc/kubernetes/manifests/kube-apiserver.yaml manifest.yaml")
	boot := simboot.Baseline(simboot.UKI)
	boot.Kernel = "6.99.0"
	f, err := boot.Files()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.Path("root/next.efi"), f.UKI, 0o600); err != nil {
		t.Fatal(err)
	}

	d := &doctor{m, t}
	found := d.findings()
	if len(found) != 1 || found[0].ID != "owner-authorization/empty" {
		t.Fatalf("%+v", found)
	}
	d.tpm2(strings.ReplaceAll(found[0].Command, "/etc/kleidi", m.Path("etc/kleidi")))
	m.Configure("  ownerAuthFile: /etc/kleidi/owner-auth\n")
	m.Sh("systemctl restart kleidi; kleidi doctor")
	for _, f := range faults {
		if !t.Run(strings.Join(f.kinds, " "), func(t *testing.T) { (&doctor{m.With(t), t}).fault(f) }) {
			return
		}
	}

	d.tpm2("tpm2_changeauth -c owner -p file:" + m.Path("etc/kleidi/owner-auth"))
	m.Configure("")
	m.Sh("rm /etc/kleidi/owner-auth; umount /proc/cmdline; systemctl restart kleidi")
}

// doctor runs kleidi doctor on a machine.
type doctor struct {
	*nspawn.Machine
	t *testing.T
}

func (m *doctor) fault(f fault) {
	m.t.Helper()
	m.only(nil)
	m.Sh(f.plant)
	found := m.only(f.kinds)
	if f.before != "" {
		m.Sh(f.before)
	}
	if f.restore != "" {
		m.Sh(f.restore)
	} else {
		for _, f := range found {
			m.Sh(strings.ReplaceAll(f.Command, "./kleidi_VERSION_"+runtime.GOARCH+".deb", "./1.deb"))
		}
	}
	if strings.Contains(f.plant, userOf) {
		m.only(nil)
		m.Sh(ofNobody)
	}
	m.only(nil)
}

type finding struct{ ID, What, Command string }

// findings are doctor's, except the one about the clock, which is the clock of the machine
// that runs the tests.
func (m *doctor) findings() (all []finding) {
	m.t.Helper()
	out, err := m.Try("kleidi doctor -o json 2>/dev/null") // there it may say that it waits
	var r struct{ Findings []finding }
	if wrong := json.Unmarshal([]byte(out), &r); wrong != nil {
		m.t.Fatalf("kleidi doctor: %v, %v: %s", err, wrong, out)
	}
	return slices.DeleteFunc(r.Findings, func(f finding) bool { return f.ID == "clock/unsynchronised" })
}

// only demands that these kinds are found, and no others.
func (m *doctor) only(kinds []string) []finding {
	m.t.Helper()
	all := m.findings()
	var got []string
	for _, f := range all {
		got = append(got, f.ID)
	}
	slices.Sort(got)
	if want := slices.Sorted(slices.Values(kinds)); !slices.Equal(slices.Compact(got), want) {
		m.t.Fatalf("doctor finds %q, want %q: %+v", got, want, all)
	}
	return all
}

// tpm2 runs a command here that uses the machine's TPM.
func (m *doctor) tpm2(command string) {
	m.t.Helper()
	cmd := exec.Command("sh", "-euc", command)
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+filepath.Join(m.Path(nspawn.Simulated), "tpm.sock"))
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("%s: %v\n%s", command, err, out)
	}
}
