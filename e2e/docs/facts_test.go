package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	top        = "../../"
	operations = top + "docs/operations.md"
	alertRules = top + "deploy/prometheus-rules.yaml"
	dashboard  = top + "deploy/helm/kleidi/files/dashboard.json"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// set returns the first group of each match.
func set(pattern, in string) map[string]bool {
	found := map[string]bool{}
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(in, -1) {
		found[m[1]] = true
	}
	return found
}

// mustContain demands every element of part in whole.
func mustContain(t *testing.T, where string, whole, part map[string]bool) {
	t.Helper()
	if len(part) == 0 {
		t.Errorf("%s: nothing to compare", where)
	}
	for name := range part {
		if !whole[name] {
			t.Errorf("%s: %s is missing or does not exist", where, name)
		}
	}
}

// ofSeveralNodes are the metrics that a node shows only with a cluster store. e2e/ha
// demands them of its nodes.
var ofSeveralNodes = []string{"kleidi_replica_up", "kleidi_fork", "kleidi_node_behind", "kleidi_rotation_waiting"}

// TestMetricsAreReal compares the names in the documents and in the alerts with the
// metrics of a serving node.
func TestMetricsAreReal(t *testing.T) {
	m := newMachine(t)
	serving(m)
	_, page, err := m.get("/metrics")
	if err != nil {
		t.Fatal(err)
	}
	live := set(`(?m)^# TYPE (kleidi_\w+) `, page)
	for _, name := range ofSeveralNodes {
		if live[name] {
			t.Errorf("a node without a cluster store shows %s", name)
		}
		live[name] = true
	}
	table := set("(?m)^\\| `(kleidi_\\w+)` \\|", read(t, operations))
	mustContain(t, "live metrics, by operations.md", live, table)
	mustContain(t, "operations.md", table, live)
	used := map[string]bool{}
	for name := range set(`\b(kleidi_\w+)`, read(t, alertRules)) {
		used[strings.TrimSuffix(name, "_bucket")] = true
	}
	mustContain(t, "live metrics, by the alerts", live, used)
	shown := map[string]bool{}
	for name := range set(`\b(kleidi_\w+)`, read(t, dashboard)) {
		shown[strings.TrimSuffix(name, "_bucket")] = true
	}
	mustContain(t, "live metrics, by the dashboard", live, shown)
}

// aDistributionHas are commands that need no mention, because each Debian or Ubuntu
// server has them.
var aDistributionHas = strings.Fields("install reboot systemctl systemd-tmpfiles tee sudo")

// TestNeedsNameTheTools: if a task runs a program that a plain machine lacks, the page
// names the program among its needs.
func TestNeedsNameTheTools(t *testing.T) {
	command := regexp.MustCompile(`(?m)(?:^|\||\$\() *(?:sudo +)?([a-z][a-z0-9-]*)`)
	needs := regexp.MustCompile(`(?s)\n(?:Needed:|You need) .*?\n\n`)
	for _, file := range []string{top + "README.md", operations} {
		needed := strings.Join(needs.FindAllString(read(t, file), -1), "")
		for _, b := range blocks(t, file) {
			if !b.commands {
				continue
			}
			for _, m := range command.FindAllStringSubmatch(b.text, -1) {
				tool := strings.TrimSuffix(m[1], "-keygen")
				if tool != "kleidi" && !slices.Contains(aDistributionHas, tool) && !regexp.MustCompile(`\b`+tool+`\b`).MatchString(needed) {
					t.Errorf("%s:%d: %s is in no need of the page: %q", file, b.line, tool, needed)
				}
			}
		}
	}
}

func TestAlertsAreExplained(t *testing.T) {
	rules := set(`(?m)^ *- alert: (\w+)$`, read(t, alertRules))
	table := set(`(?m)^\| (Kleidi\w+) \|`, read(t, operations))
	mustContain(t, "operations.md", table, rules)
	mustContain(t, alertRules, rules, table)
}

func TestCausesAreExplained(t *testing.T) {
	code := set(`Cause = "([a-z-]+)"`, read(t, top+"seal/errors.go"))
	table := map[string]bool{}
	for row := range set("(?m)^\\| (`[a-z-]+`(?:, `[a-z-]+`)*) \\|", read(t, operations)) {
		for name := range set("`([a-z-]+)`", row) {
			table[name] = true
		}
	}
	mustContain(t, "operations.md", table, code)
}

var (
	link      = regexp.MustCompile(`\]\(([^)#:]*)(?:#([^)]*))?\)`)
	proof     = regexp.MustCompile("`([\\w/]+_test\\.go)` ((?:Test\\w+(?:, )?)+)")
	code      = regexp.MustCompile("(?s)```.*?```|`[^`\\n]*`")
	heading   = regexp.MustCompile(`(?m)^#+ (.*)$`)
	unlinked  = regexp.MustCompile("[^a-z0-9 _-]")
	mustExist = []string{"README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md"}
)

// TestLinksLeadSomewhere follows the links between the documents.
func TestLinksLeadSomewhere(t *testing.T) {
	files, err := filepath.Glob(top + "docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range mustExist {
		files = append(files, top+name)
	}
	for _, file := range files {
		for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(read(t, file), ""), -1) {
			target := file
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(file), m[1])
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", file, err)
			} else if m[2] != "" && !anchors(read(t, target))[m[2]] {
				t.Errorf("%s: %s has no section #%s", file, target, m[2])
			}
		}
	}
}

// anchors returns the headings in the form of GitHub's links.
func anchors(text string) map[string]bool {
	all := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		all[strings.ReplaceAll(unlinked.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
	}
	return all
}

// TestThreatModelNamesRealTests: each test that the threat model names exists.
func TestThreatModelNamesRealTests(t *testing.T) {
	found := 0
	for _, m := range proof.FindAllStringSubmatch(read(t, top+"docs/threat-model.md"), -1) {
		code := read(t, top+m[1])
		for _, name := range strings.Split(strings.TrimSuffix(m[2], ", "), ", ") {
			found++
			if !strings.Contains(code, "func "+name+"(") {
				t.Errorf("docs/threat-model.md: %s has no %s", m[1], name)
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d tests are named", found)
	}
}
