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
)

// build makes the packages of a version, in a new folder, and returns it.
func build(t *testing.T, version string) string {
	t.Helper()
	out := t.TempDir()
	run(t, "../../deploy/packages/build", node.Binary(t), version, out)
	return out
}

// TestReproducible: the same binary and commit give the same bytes, and the .rpm holds what
// the .deb holds, less dpkg's hooks. No machine with dnf can be had here: rpm itself
// unpacks it, into a folder.
func TestReproducible(t *testing.T) {
	t.Parallel()
	first, second := build(t, "v1.0.0"), build(t, "v1.0.0")
	for _, name := range []string{"kleidi_1.0.0_amd64.deb", "kleidi-1.0.0-1.x86_64.rpm"} {
		run(t, "cmp", filepath.Join(first, name), filepath.Join(second, name))
	}
	deb, rpm := t.TempDir(), t.TempDir()
	run(t, "dpkg-deb", "-x", filepath.Join(first, "kleidi_1.0.0_amd64.deb"), deb)
	run(t, "rpm", "--root", rpm, "--dbpath", "/var/lib/rpm", "--nodeps", "--noscripts", "-i", filepath.Join(first, "kleidi-1.0.0-1.x86_64.rpm"))
	if err := errors.Join(os.RemoveAll(filepath.Join(deb, "etc/dpkg")), os.RemoveAll(filepath.Join(deb, "etc/kernel")), os.RemoveAll(filepath.Join(deb, "etc/initramfs")),
		os.RemoveAll(filepath.Join(rpm, "var"))); err != nil {
		t.Fatal(err)
	}
	const list = `cd "$0" && find . -type f -printf '%M %p ' -exec sha256sum {} + | sort`
	if d, r := run(t, "sh", "-c", list, deb), run(t, "sh", "-c", list, rpm); d != r || d == "" {
		t.Errorf("the .deb holds\n%s\nthe .rpm\n%s", d, r)
	}
}

// TestPackages is one machine's life, from the installation to the purge.
func TestPackages(t *testing.T) {
	t.Parallel()
	first, second := build(t, "v1.0.0"), build(t, "v1.1.0")
	m := boot(t)
	step := func(name string, f func(*testing.T, *machine)) {
		if t.Failed() {
			return
		}
		t.Run(name, func(t *testing.T) { f(t, &machine{t, m.root, m.leader}) })
	}
	for name, version := range map[string]string{"1.deb": filepath.Join(first, "kleidi_1.0.0_amd64.deb"), "2.deb": filepath.Join(second, "kleidi_1.1.0_amd64.deb")} {
		run(t, "cp", version, m.path("root/"+name))
	}
	step("install", install)
	step("init", initialise)
	step("slow TPM", slowTPM)
	step("sandbox", sandbox)
	step("lives", lives)
	step("configuration", configuration)
	step("upgrade", upgrade)
	step("remove", remove)
	step("purge", purge)
}

func install(t *testing.T, m *machine) {
	if out := m.sh("dpkg -i 1.deb"); !strings.Contains(out, "kleidi init") {
		t.Errorf("dpkg does not say what comes next:\n%s", out)
	}
	m.sh(`test "$(dpkg --verify kleidi)" = ""`)
	if out, err := m.try("systemctl is-enabled kleidi"); err == nil {
		t.Errorf("kleidi starts before there is a keyring: %s", out)
	}
	m.sh("systemctl is-enabled kleidi-booted")
	want := "drwxr-xr-x root /etc/kleidi\ndrwxr-xr-x root /run/kleidi\ndrwx------ root /var/lib/kleidi\n"
	if got := m.sh("stat -c '%A %U %n' /etc/kleidi /run/kleidi /var/lib/kleidi"); got != want {
		t.Errorf("folders:\n%s", got)
	}
	if out := m.sh("systemd-analyze verify --man=no /usr/lib/systemd/system/kleidi*.service 2>&1"); out != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	m.sh("test -x /usr/sbin/kleidi-next-boot; gzip -dc /usr/share/man/man8/kleidi-init.8.gz | grep -q -- --recovery-recipient")
	m.sh("! grep -r /usr/local/s*bin/ /usr/lib/systemd/system/kleidi*.service /etc/dpkg/dpkg.cfg.d/kleidi")
}

// initialise: systemctl returns when the keyring is open, so that status shows it.
func initialise(t *testing.T, m *machine) {
	m.configure("")
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	m.sh("kleidi init --encryption-config /etc/kubernetes/kleidi-encryption.yaml --recovery-recipient " + identity.Recipient().String())
	m.sh("systemctl enable -q kleidi")
	if out := m.sh("systemctl start kleidi; kleidi status --quick"); !regexp.MustCompile(`^state +open`).MatchString(out) {
		t.Errorf("status right after the start: %s", out)
	}
	m.sh("mkdir /etc/kubernetes/manifests")
	m.write("etc/kubernetes/manifests/kube-apiserver.yaml", "spec: {containers: [{command: [kube-apiserver], volumeMounts: []}], volumes: []}\n")
	if out, err := m.try("kleidi doctor"); err == nil || !strings.Contains(out, "PROBLEM  kube-apiserver") || strings.Count(out, "PROBLEM") != 1 {
		t.Errorf("kleidi doctor: %v\n%s", err, out)
	}
	m.sh("kleidi kubeadm patch --apply; kleidi doctor; kleidi keyring backup /root/keyring.json")
}

// slowTPM: systemctl start waits until the first attempt to unlock has ended, here in vain.
func slowTPM(t *testing.T, m *machine) {
	silent, err := net.Listen("unix", m.path(simulated+"/silent.sock")) // takes commands, and answers none
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	m.sh("systemctl stop kleidi; sed -i 's|/tpm.sock|/silent.sock\\n  timeout: 2s|' /etc/kleidi/config.yaml; systemctl start kleidi")
	_, body, err := node.Get(m.live("/run/kleidi/http.sock"), "/readyz")
	if err != nil || !strings.Contains(body, "backend-unavailable") {
		t.Errorf("after a start with a silent TPM: %v %s", err, body)
	}
	m.configure("")
	m.sh("systemctl restart kleidi; kleidi status --quick")
}

// sandbox: the unit names each protection that systemd-analyze misses, with the reason.
func sandbox(t *testing.T, m *machine) {
	var checks []struct {
		Name     string `json:"json_field"`
		Set      *bool  `json:"set"`
		Exposure string `json:"exposure"`
	}
	if err := json.Unmarshal([]byte(m.sh("systemd-analyze security --json=short --no-pager kleidi")), &checks); err != nil {
		t.Fatal(err)
	}
	unit, err := os.ReadFile(m.path("usr/lib/systemd/system/kleidi.service"))
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(unit), "# Weak")
	missing := map[string]bool{}
	for _, c := range checks {
		if c.Exposure != "" && c.Exposure != "0.0" {
			missing[c.Name] = true
			if !strings.Contains(list, "#   "+c.Name+": ") {
				t.Errorf("the unit does not say why %s is weak (%s)", c.Name, c.Exposure)
			}
		}
	}
	for line := range strings.Lines(list) {
		if rest, ok := strings.CutPrefix(line, "#   "); ok && rest[0] != ' ' {
			if name, _, _ := strings.Cut(rest, ":"); !missing[name] {
				t.Errorf("the unit says that %s is weak, which it is not", name)
			}
		}
	}
	if out := m.sh("systemd-analyze security --no-pager kleidi | tail -n 1"); !strings.Contains(out, " OK ") {
		t.Errorf("%s", out)
	}
}

// lives: kube-apiserver keeps its socket.
func lives(t *testing.T, m *machine) {
	a := m.apiserver()
	a.during("reload", func() { m.sh("systemctl reload kleidi") })
	a.during("restart", func() { m.sh("systemctl restart kleidi") })
	a.during("stop and start", func() { m.sh("systemctl stop kleidi; systemctl start kleidi") })
	// Only the call in progress fails. The folder that kube-apiserver mounted has the new socket.
	for range 2 {
		m.sh("kill -9 $(systemctl show -P MainPID kleidi)")
		node.Eventually(t, 10*time.Second, "after kill -9, a call is answered", a.call)
	}
}

// configuration: a faulty one stops the start and is told; once it is corrected, kleidi
// starts by itself, however often it had failed.
func configuration(t *testing.T, m *machine) {
	m.sh("systemctl stop kleidi")
	m.configure("nonsense: true\n")
	if out, err := m.try("systemctl start kleidi"); err == nil {
		t.Errorf("systemctl start is content: %s", out)
	}
	if out := m.sh("systemctl status -n 20 --no-pager kleidi || true"); !strings.Contains(out, "nonsense") {
		t.Errorf("systemctl status does not tell the fault: %s", out)
	}
	// systemd's own limit would be five starts in ten seconds
	m.sh(`running() { systemctl show -P MainPID kleidi; }
for i in 1 2 3 4 5 6; do
	while pid=$(running) && [ "$pid" = 0 ]; do sleep 0.05; done
	kill -9 "$pid"
	while [ "$(running)" = "$pid" ]; do sleep 0.05; done
done`)
	m.configure("")
	node.Eventually(t, 30*time.Second, "kleidi is open again", func() error {
		out, err := m.try("kleidi status --quick")
		if err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
}

// upgrade keeps the state and the edited configuration, and no call fails.
func upgrade(t *testing.T, m *machine) {
	a := m.apiserver()
	state := m.sh("cd /var/lib/kleidi && sha256sum *.json /etc/kleidi/config.yaml")
	pid := m.sh("systemctl show -P MainPID kleidi")
	a.during("upgrade", func() { m.sh("dpkg --force-confold -i 2.deb") })
	if now := m.sh("systemctl show -P MainPID kleidi"); now == pid {
		t.Error("the former version still runs")
	}
	if now := m.sh("cd /var/lib/kleidi && sha256sum *.json /etc/kleidi/config.yaml"); now != state {
		t.Errorf("state before\n%s\nafter\n%s", state, now)
	}
	if v := m.sh("dpkg-query -W -f '${Version}' kleidi; systemctl is-enabled kleidi"); v != "1.1.0enabled\n" {
		t.Errorf("%s", v)
	}
	// A stopped one stays stopped
	m.sh("systemctl stop kleidi; dpkg --force-confold -i 2.deb; ! systemctl is-active kleidi; systemctl start kleidi")
}

func remove(t *testing.T, m *machine) {
	m.sh("dpkg -r kleidi")
	for _, gone := range []string{"usr/bin/kleidi", "usr/lib/systemd/system/kleidi.service", "etc/systemd/system/multi-user.target.wants/kleidi.service"} {
		if m.exists(gone) {
			t.Errorf("%s is left", gone)
		}
	}
	m.sh("test ! -e /run/kleidi/kms.sock; ! systemctl is-active kleidi")
	for _, kept := range []string{"var/lib/kleidi/keyring.json", "etc/kleidi/config.yaml"} {
		if !m.exists(kept) {
			t.Errorf("%s is gone", kept)
		}
	}
	// The hook of dpkg that is left fails nothing
	m.sh("dpkg --configure -a")
	m.sh("dpkg -i 2.deb && systemctl start kleidi && kleidi status --quick && dpkg -r kleidi")
}

func purge(t *testing.T, m *machine) {
	if out := m.sh("dpkg -P kleidi 2>&1"); !strings.Contains(out, "/var/lib/kleidi stays") {
		t.Errorf("a purge does not tell that the keyring stays:\n%s", out)
	}
	if m.exists("etc/kleidi/config.yaml") || m.exists("etc/dpkg/dpkg.cfg.d/kleidi") {
		t.Error("the configuration is left")
	}
	if !m.exists("var/lib/kleidi/keyring.json") {
		t.Error("the keyring is gone")
	}
	m.sh("dpkg -i 2.deb && KLEIDI_PURGE=keyring dpkg -P kleidi")
	if m.exists("var/lib/kleidi") {
		t.Error("the keyring is left")
	}
}
