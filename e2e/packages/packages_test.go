package packages

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

// TestReproducible: the same binary and commit give the same bytes, and the .rpm holds
// the same files as the .deb, except dpkg's hooks. No machine with dnf is available here,
// so rpm itself unpacks the package into a folder.
func TestReproducible(t *testing.T) {
	t.Parallel()
	first, second := nspawn.Package(t, "v1.0.0"), nspawn.Package(t, "v1.0.0")
	for _, name := range []string{"kleidi_1.0.0_amd64.deb", "kleidi-1.0.0-1.x86_64.rpm"} {
		nspawn.Run(t, "cmp", filepath.Join(first, name), filepath.Join(second, name))
	}
	deb, rpm := t.TempDir(), t.TempDir()
	nspawn.Run(t, "dpkg-deb", "-x", filepath.Join(first, "kleidi_1.0.0_amd64.deb"), deb)
	nspawn.Run(t, "rpm", "--root", rpm, "--dbpath", "/var/lib/rpm", "--nodeps", "--noscripts", "-i", filepath.Join(first, "kleidi-1.0.0-1.x86_64.rpm"))
	if err := errors.Join(os.RemoveAll(filepath.Join(deb, "etc/dpkg")), os.RemoveAll(filepath.Join(deb, "etc/kernel")), os.RemoveAll(filepath.Join(deb, "etc/initramfs")),
		os.RemoveAll(filepath.Join(rpm, "var"))); err != nil {
		t.Fatal(err)
	}
	const list = `cd "$0" && find . -type f -printf '%M %p ' -exec sha256sum {} + | sort`
	if d, r := nspawn.Run(t, "sh", "-c", list, deb), nspawn.Run(t, "sh", "-c", list, rpm); d != r || d == "" {
		t.Errorf("the .deb holds\n%s\nthe .rpm\n%s", d, r)
	}
}

// TestPackages is one machine's life, from the installation to the purge.
func TestPackages(t *testing.T) {
	t.Parallel()
	first, second := nspawn.Package(t, "v1.0.0"), nspawn.Package(t, "v1.1.0")
	m := boot(t)
	step := func(name string, f func(*testing.T, *nspawn.Machine)) {
		if t.Failed() {
			return
		}
		t.Run(name, func(t *testing.T) { f(t, m.With(t)) })
	}
	for name, version := range map[string]string{"1.deb": filepath.Join(first, "kleidi_1.0.0_amd64.deb"), "2.deb": filepath.Join(second, "kleidi_1.1.0_amd64.deb")} {
		nspawn.Run(t, "cp", version, m.Path("root/"+name))
	}
	systemdBoot(t, m)
	step("install", install)
	step("init", initialise)
	step("doctor", doctored)
	step("kernels of systemd-boot", kernelsOfSystemdBoot)
	step("slow TPM", slowTPM)
	step("sandbox", sandbox)
	step("lives", lives)
	step("configuration", configuration)
	step("upgrade", upgrade)
	step("variants", variants)
	step("remove", remove)
	step("purge", purge)
	step("kernels of GRUB", kernelsOfGRUB)
	step("verifier", verifier)
}

func install(t *testing.T, m *nspawn.Machine) {
	if out := m.Sh("dpkg -i 1.deb"); !strings.Contains(out, "kleidi init") {
		t.Errorf("dpkg does not say what comes next:\n%s", out)
	}
	m.Sh(`test "$(dpkg --verify kleidi)" = ""`)
	if out, err := m.Try("systemctl is-enabled kleidi"); err == nil {
		t.Errorf("kleidi starts before there is a keyring: %s", out)
	}
	m.Sh("systemctl is-enabled kleidi-booted")
	want := "drwxr-xr-x root /etc/kleidi\ndrwxr-xr-x root /run/kleidi\ndrwx------ root /var/lib/kleidi\n"
	if got := m.Sh("stat -c '%A %U %n' /etc/kleidi /run/kleidi /var/lib/kleidi"); got != want {
		t.Errorf("folders:\n%s", got)
	}
	if out := m.Sh("systemd-analyze verify --man=no /usr/lib/systemd/system/kleidi*.service 2>&1"); out != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	m.Sh("test -x /usr/sbin/kleidi-next-boot; gzip -dc /usr/share/man/man8/kleidi-init.8.gz | grep -q -- --recovery-recipient")
	m.Sh("! grep -r /usr/local/s*bin/ /usr/lib/systemd/system/kleidi*.service /etc/dpkg/dpkg.cfg.d/kleidi")
}

// initialise: systemctl returns when the keyring is open, so status shows it as open.
func initialise(t *testing.T, m *nspawn.Machine) {
	m.Configure("")
	m.Sh("kleidi init --encryption-config /etc/kubernetes/kleidi-encryption.yaml --recovery-recipient " + recipient(t))
	m.Sh("systemctl enable -q kleidi")
	if out := m.Sh("systemctl start kleidi; kleidi status --quick"); !regexp.MustCompile(`^state +open`).MatchString(out) {
		t.Errorf("status right after the start: %s", out)
	}
	m.Sh("mkdir /etc/kubernetes/manifests")
	m.Write("etc/kubernetes/manifests/kube-apiserver.yaml", "spec: {containers: [{command: [kube-apiserver], volumeMounts: []}], volumes: []}\n")
	if out, err := m.Try("kleidi doctor"); err == nil || !strings.Contains(out, "PROBLEM  manifest/unpatched") || strings.Count(out, "PROBLEM") != 1 {
		t.Errorf("kleidi doctor: %v\n%s", err, out)
	}
	m.Sh("kleidi kubeadm patch --apply --wait=false; kleidi doctor; kleidi keyring backup /root/keyring.json")
}

// recipient returns a recovery recipient, whose identity nobody keeps.
func recipient(t *testing.T) string {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return identity.Recipient().String()
}

// slowTPM: systemctl start waits until the first attempt to unlock has ended, here
// without success.
func slowTPM(t *testing.T, m *nspawn.Machine) {
	silent, err := net.Listen("unix", m.Path(nspawn.Simulated+"/silent.sock")) // takes commands, and answers none
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	m.Sh("systemctl stop kleidi; sed -i 's|/tpm.sock|/silent.sock\\n  timeout: 2s|' /etc/kleidi/config.yaml; systemctl start kleidi")
	_, body, err := node.Get(m.Live("/run/kleidi/http.sock"), "/readyz")
	if err != nil || !strings.Contains(body, "backend-unavailable") {
		t.Errorf("after a start with a silent TPM: %v %s", err, body)
	}
	m.Configure("")
	m.Sh("systemctl restart kleidi; kleidi status --quick")
}

// sandbox: the units explain each protection that systemd-analyze finds missing.
func sandbox(t *testing.T, m *nspawn.Machine) {
	for _, unit := range []string{"kleidi", "kleidi-verifier"} {
		sandboxOf(t, m, unit)
	}
}

func sandboxOf(t *testing.T, m *nspawn.Machine, unit string) {
	t.Helper()
	var checks []struct {
		Name     string `json:"json_field"`
		Set      *bool  `json:"set"`
		Exposure string `json:"exposure"`
	}
	if err := json.Unmarshal([]byte(m.Sh("systemd-analyze security --json=short --no-pager "+unit)), &checks); err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(m.Read("usr/lib/systemd/system/"+unit+".service"), "# Weak")
	missing := map[string]bool{}
	for _, c := range checks {
		if c.Exposure != "" && c.Exposure != "0.0" {
			missing[c.Name] = true
			if !strings.Contains(list, "#   "+c.Name+": ") {
				t.Errorf("%s does not say why %s is weak (%s)", unit, c.Name, c.Exposure)
			}
		}
	}
	for line := range strings.Lines(list) {
		if rest, ok := strings.CutPrefix(line, "#   "); ok && rest[0] != ' ' {
			if name, _, _ := strings.Cut(rest, ":"); !missing[name] {
				t.Errorf("%s says that %s is weak, which it is not", unit, name)
			}
		}
	}
	if out := m.Sh("systemd-analyze security --no-pager " + unit + " | tail -n 1"); !strings.Contains(out, " OK ") {
		t.Errorf("%s: %s", unit, out)
	}
}

// lives: kube-apiserver keeps its socket.
func lives(t *testing.T, m *nspawn.Machine) {
	a := newAPIServer(t, m)
	a.during("reload", func() { m.Sh("systemctl reload kleidi") })
	a.during("restart", func() { m.Sh("systemctl restart kleidi") })
	a.during("stop and start", func() { m.Sh("systemctl stop kleidi; systemctl start kleidi") })
	// Only the call in progress fails. The folder that kube-apiserver mounted has the new socket.
	for range 2 {
		m.Sh("kill -9 $(systemctl show -P MainPID kleidi)")
		node.Eventually(t, 2*time.Minute, "after kill -9, a call is answered", a.call)
	}
}

// configuration: a faulty configuration stops the start and is reported. Once it is
// corrected, kleidi starts by itself, however often it had failed.
func configuration(t *testing.T, m *nspawn.Machine) {
	m.Sh("systemctl stop kleidi")
	m.Configure("nonsense: true\n")
	if out, err := m.Try("systemctl start kleidi"); err == nil {
		t.Errorf("systemctl start is content: %s", out)
	}
	if out := m.Sh("systemctl status -n 20 --no-pager kleidi || true"); !strings.Contains(out, "nonsense") {
		t.Errorf("systemctl status does not tell the fault: %s", out)
	}
	// systemd's default limit is five starts in ten seconds
	m.Sh(`running() { systemctl show -P MainPID kleidi; }
for i in 1 2 3 4 5 6; do
	while pid=$(running) && [ "$pid" = 0 ]; do sleep 0.05; done
	kill -9 "$pid" || true
	while [ "$(running)" = "$pid" ]; do sleep 0.05; done
done`)
	m.Configure("")
	node.Eventually(t, 2*time.Minute, "kleidi is open again", func() error {
		out, err := m.Try("kleidi status --quick")
		if err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
}

// upgrade keeps the state and the edited configuration, and no call fails.
func upgrade(t *testing.T, m *nspawn.Machine) {
	a := newAPIServer(t, m)
	state := m.Sh("cd /var/lib/kleidi && sha256sum *.json /etc/kleidi/config.yaml")
	pid := m.Sh("systemctl show -P MainPID kleidi")
	a.during("upgrade", func() { m.Sh("dpkg --force-confold -i 2.deb") })
	if now := m.Sh("systemctl show -P MainPID kleidi"); now == pid {
		t.Error("the former version still runs")
	}
	if now := m.Sh("cd /var/lib/kleidi && sha256sum *.json /etc/kleidi/config.yaml"); now != state {
		t.Errorf("state before\n%s\nafter\n%s", state, now)
	}
	if v := m.Sh("dpkg-query -W -f '${Version}' kleidi; systemctl is-enabled kleidi"); v != "1.1.0enabled\n" {
		t.Errorf("%s", v)
	}
	// A stopped unit stays stopped
	m.Sh("systemctl stop kleidi; dpkg --force-confold -i 2.deb; ! systemctl is-active kleidi; systemctl start kleidi")
}

func remove(t *testing.T, m *nspawn.Machine) {
	m.Sh("dpkg -r kleidi")
	for _, gone := range []string{"usr/bin/kleidi", "usr/lib/systemd/system/kleidi.service", "etc/systemd/system/multi-user.target.wants/kleidi.service"} {
		if m.Exists(gone) {
			t.Errorf("%s is left", gone)
		}
	}
	m.Sh("test ! -e /run/kleidi/kms.sock; ! systemctl is-active kleidi")
	for _, kept := range []string{"var/lib/kleidi/keyring.json", "etc/kleidi/config.yaml"} {
		if !m.Exists(kept) {
			t.Errorf("%s is gone", kept)
		}
	}
	// The remaining dpkg hook causes no failure
	m.Sh("dpkg --configure -a")
	m.Sh("dpkg -i 2.deb && systemctl start kleidi && kleidi status --quick && dpkg -r kleidi")
}

func purge(t *testing.T, m *nspawn.Machine) {
	if out := m.Sh("dpkg -P kleidi 2>&1"); !strings.Contains(out, "/var/lib/kleidi stays") {
		t.Errorf("a purge does not tell that the keyring stays:\n%s", out)
	}
	if m.Exists("etc/kleidi/config.yaml") || m.Exists("etc/dpkg/dpkg.cfg.d/kleidi") {
		t.Error("the configuration is left")
	}
	if !m.Exists("var/lib/kleidi/keyring.json") {
		t.Error("the keyring is gone")
	}
	m.Sh("dpkg -i 2.deb && KLEIDI_PURGE=keyring dpkg -P kleidi")
	if m.Exists("var/lib/kleidi") {
		t.Error("the keyring is left")
	}
}
