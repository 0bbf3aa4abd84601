package docs

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

func TestCommandsOfTheDocuments(t *testing.T) {
	for _, file := range documents {
		t.Run(filepath.Base(file), func(t *testing.T) {
			r := &reader{t: t}
			for _, b := range blocks(t, file) {
				r.where = fmt.Sprintf("%s:%d", filepath.Base(file), b.line)
				r.follow(b)
			}
			r.leave()
			if r.ran == 0 {
				t.Errorf("%s shows no command that was run", file)
			}
		})
	}
}

// reader follows a document, block by block.
type reader struct {
	t      *testing.T
	where  string
	m      *machine
	output string
	said   []string // the outputs of this scene's commands
	ran    int
}

// turn continues at another machine of the scene.
func (r *reader) turn(name string) {
	r.t.Helper()
	if r.m == nil || r.m.cast[name] == nil {
		r.t.Fatalf("%s: the scene has no machine %q", r.where, name)
	}
	r.m = r.m.cast[name]
}

func (r *reader) follow(b block) {
	r.t.Helper()
	b.comment, b.exit, _ = strings.Cut(b.comment, ", exit code ")
	scene, onScene := strings.CutPrefix(b.comment, "run on: ")
	next, onNext := strings.CutPrefix(b.comment, "run next on ")
	configured, onConfigured := strings.CutPrefix(b.comment, "configures ")
	reason, notRun := strings.CutPrefix(b.comment, "not run: ")
	switch {
	case b.comment == "prints" && !b.commands:
		r.compare(b.text)
	case b.comment == "configures" && !b.commands && r.m != nil:
		r.m.set(b.text)
	case onConfigured && !b.commands:
		r.turn(configured)
		r.m.set(b.text)
	case !b.commands:
	case onScene:
		r.leave()
		start, ok := scenes[scene]
		if !ok {
			r.t.Fatalf("%s: there is no scene %q", r.where, scene)
		}
		r.m = newMachine(r.t)
		start(r.m)
		r.said = nil
		r.run(b)
	case onNext:
		r.turn(next)
		r.run(b)
	case b.comment == "run next" && r.m != nil:
		r.run(b)
	case notRun && strings.TrimSpace(reason) != "":
	default:
		r.t.Errorf("%s: the comment before the block must say whether it is run, and if not why; it is %q", r.where, b.comment)
	}
}

func (r *reader) run(b block) {
	r.t.Helper()
	r.m.serveIfPossible()
	text := r.fill(b.text)
	out, err := r.m.shell(text)
	for deadline := time.Now().Add(5 * time.Minute); joinAgain(text, out, err) && time.Now().Before(deadline); out, err = r.m.shell(text) {
		r.t.Logf("%s: again: %v\n%s", r.where, err, out)
	}
	r.t.Logf("%s:\n%s%s", r.where, text, out)
	if b.exit != "" && err != nil && err.Error() == "exit status "+b.exit {
		err, b.exit = nil, ""
	}
	if err != nil || b.exit != "" {
		r.t.Fatalf("%s: %v, want exit code %q", r.where, err, b.exit)
	}
	r.output = out
	r.said = append(r.said, out)
	r.ran++
	r.m.rebootIfAsked()
}

// joinAgain reports whether a join failed for a reason that a busy machine may cause. The
// document also says to run it again if it breaks off.
func joinAgain(commands, out string, err error) bool {
	return err != nil && strings.Contains(commands, "kleidi join ") && node.HasOneOf(out, node.JoinAgain)
}

// elided is a flag whose value the document shows shortened.
var elided = regexp.MustCompile(`--([a-z-]+) (\S*)…`)

// fill completes the shortened values from the output of the scene's commands: after the
// flag's name, in a table or in a command.
func (r *reader) fill(text string) string {
	r.t.Helper()
	return elided.ReplaceAllStringFunc(text, func(short string) string {
		part := elided.FindStringSubmatch(short)
		value := regexp.MustCompile(`(?i)\b` + part[1] + ` +(` + regexp.QuoteMeta(part[2]) + `\S+)`)
		for _, out := range slices.Backward(r.said) {
			if found := value.FindStringSubmatch(out); found != nil {
				return "--" + part[1] + " " + found[1]
			}
		}
		r.t.Fatalf("%s: no command has printed the value of %s", r.where, short)
		return ""
	})
}

// compare demands every line of text in the output of the last block.
func (r *reader) compare(text string) {
	r.t.Helper()
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		if strings.TrimSpace(line) != "" && !matcher(line).MatchString(r.output) {
			r.t.Errorf("%s: the commands do not print this line: %s\nbut this:\n%s", r.where, line, r.output)
		}
	}
}

// leave ends a scene. At the end of every scene kleidi must be open, and nothing may be
// lost.
func (r *reader) leave() {
	r.t.Helper()
	for _, m := range r.m.all() {
		m.serveIfPossible()
		m.checkNothingLost()
	}
	r.m = nil
}

func TestLinesMatchAsShown(t *testing.T) {
	for _, c := range []struct {
		line, output string
		want         bool
	}{
		{"state  locked", "a\nstate          locked\n", true},
		{"state  locked since …", "state          locked since 2026-11-21\n", true},
		{"state  open", "state          locked\n", false},
		{"slot tpm … (opens now)", "slot           tpm  PCR 4, 7, 11 (sha256), up to epoch 2  (opens now)", true},
		{"slot tpm … (opens now)", "slot           tpm  PCR 4, 7, 11 (sha256), up to epoch 2  (DOES NOT OPEN)", false},
	} {
		if got := matcher(c.line).MatchString(c.output); got != c.want {
			t.Errorf("%q in %q: %v", c.line, c.output, got)
		}
	}
}
