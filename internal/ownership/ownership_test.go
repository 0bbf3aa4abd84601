package ownership

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// stranger is a user that no test runs as.
const stranger = 1000

// tree makes the files for the tests. It needs root, like the suite's other tests of
// users.
type tree struct {
	t    *testing.T
	base string
}

func newTree(t *testing.T) *tree {
	t.Helper()
	base := t.TempDir()
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	return &tree{t, base}
}

func (r *tree) path(name string) string { return filepath.Join(r.base, name) }

func (r *tree) own(name string, mode os.FileMode, uid int) {
	r.t.Helper()
	if err := errors.Join(os.Chown(r.path(name), uid, 0), os.Chmod(r.path(name), mode)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *tree) folder(name string, mode os.FileMode, uid int) {
	r.t.Helper()
	if err := os.Mkdir(r.path(name), 0o700); err != nil {
		r.t.Fatal(err)
	}
	r.own(name, mode, uid)
}

func (r *tree) file(name string, mode os.FileMode, uid int) {
	r.t.Helper()
	if err := os.WriteFile(r.path(name), nil, 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.own(name, mode, uid)
}

func (r *tree) link(name, target string, uid int) {
	r.t.Helper()
	if err := errors.Join(os.Symlink(target, r.path(name)), os.Lchown(r.path(name), uid, 0)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *tree) open(name string) *os.File {
	r.t.Helper()
	f, err := os.Open(r.path(name))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { f.Close() })
	return f
}

func (r *tree) rename(from, to string) {
	r.t.Helper()
	if err := os.Rename(r.path(from), r.path(to)); err != nil {
		r.t.Fatal(err)
	}
}

// wants checks an error: "" for an accepted path, otherwise texts that the error must
// contain.
func wants(t *testing.T, path string, err error, texts ...string) {
	t.Helper()
	if len(texts) == 0 && err != nil {
		t.Errorf("%s: %v", path, err)
	}
	for _, text := range texts {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: error lacks %q: %v", path, text, err)
		}
	}
}

func TestCheckFile(t *testing.T) {
	r := newTree(t)
	r.folder("good", 0o755, 0)
	r.folder("group", 0o775, 0)
	r.folder("all", 0o777, 0)
	r.folder("sticky", os.ModeSticky|0o777, 0)
	r.folder("foreign", 0o755, stranger)
	r.folder("foreign/good", 0o755, 0)
	r.folder("foreignsticky", os.ModeSticky|0o777, stranger)
	for _, dir := range []string{"good", "group", "all", "sticky", "foreign", "foreign/good", "foreignsticky"} {
		r.file(dir+"/f", 0o644, 0)
	}
	r.file("good/group", 0o664, 0)
	r.file("good/all", 0o646, 0)
	r.file("good/foreign", 0o600, stranger)
	r.link("link", "good/f", stranger) // its owner can't replace it
	r.link("linkout", "foreign/f", 0)
	r.link("foreign/out", "../good/f", 0) // here the owner can
	r.link("sticky/mine", "../good/f", 0)
	r.link("sticky/theirs", "../good/f", stranger)
	r.link("up", "good/../good/./f", 0)
	r.link("loop", "loop", 0)
	r.folder("good/deep", 0o755, 0)
	r.folder("foreign/deep", 0o755, 0)
	r.link("good/away", "../foreign/deep", 0)
	for name, texts := range map[string][]string{
		"good/away/../f": {"folder " + r.path("foreign") + " belongs to UID 1000"}, // not good/f
		"good/f":         nil, "link": nil, "up": nil, "sticky/f": nil, "sticky/mine": nil, "good//../good/f": nil,
		"good/group":      {"good/group has mode 0664", "chmod go-w " + r.path("good/group")},
		"good/all":        {"has mode 0646"},
		"good/foreign":    {"file " + r.path("good/foreign") + " belongs to UID 1000", "chown root " + r.path("good/foreign")},
		"group/f":         {"folder " + r.path("group") + " has mode 0775", "chmod go-w " + r.path("group")},
		"all/f":           {"/all has mode 0777"},
		"foreign/f":       {"folder " + r.path("foreign") + " belongs to UID 1000"},
		"foreign/good/f":  {"folder " + r.path("foreign") + " belongs to UID 1000"},
		"foreignsticky/f": {"/foreignsticky belongs to UID 1000"},
		"linkout":         {"folder " + r.path("foreign") + " belongs to UID 1000"},
		"foreign/out":     {"folder " + r.path("foreign") + " belongs to UID 1000"},
		"sticky/theirs":   {"symbolic link " + r.path("sticky/theirs") + " belongs to UID 1000"},
		"loop":            {"too many levels of symbolic links"},
		"missing":         {"no such file"},
	} {
		wants(t, name, CheckFile(r.base+"/"+name), texts...)
	}
	if err := CheckFile(r.path("missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

// TestCheckOpen judges the open file, and not another one that has taken its name
// since.
func TestCheckOpen(t *testing.T) {
	r := newTree(t)
	r.folder("good", 0o755, 0)
	r.folder("group", 0o775, 0)
	r.file("good/f", 0o600, 0)
	r.file("good/all", 0o646, 0)
	r.file("group/f", 0o600, 0)
	for name, texts := range map[string][]string{
		"good/f": nil, "good/all": {"good/all has mode 0646"}, "group/f": {"folder " + r.path("group") + " has mode 0775"},
	} {
		f := r.open(name)
		wants(t, name, CheckOpen(f), texts...)
		if name == "good/all" {
			r.rename("good/f", name)
			wants(t, "replaced since", CheckOpen(f), texts...)
			r.file("good/f", 0o600, 0)
		}
	}
}

// TestRemedyIsACommand: the remedy can be copied into a shell, whatever the path.
func TestRemedyIsACommand(t *testing.T) {
	r := newTree(t)
	for _, name := range []string{"plain.yaml", "with space", "it's", "$(reboot)", "*", "new\nline"} {
		r.file(name, 0o666, 0)
		err := CheckFile(r.path(name))
		_, remedy := seal.SplitHint(err)
		if out, shellErr := exec.Command("sh", "-c", remedy).CombinedOutput(); shellErr != nil {
			t.Errorf("%q: %s: %v, %s", name, remedy, shellErr, out)
		}
		wants(t, name, CheckFile(r.path(name)))
		if seal.CauseOf(err) != seal.CauseConfiguration {
			t.Errorf("%q: %v", name, err)
		}
	}
	t.Chdir(r.base)
	r.file("-rf", 0o666, 0)
	if _, remedy := seal.SplitHint(CheckFile("-rf")); remedy != "chmod go-w ./-rf" {
		t.Errorf("a name like a flag: %s", remedy)
	}
	r.folder("sticky", os.ModeSticky|0o777, 0)
	r.link("sticky/theirs", "../plain.yaml", stranger)
	if _, remedy := seal.SplitHint(CheckFile("sticky/theirs")); remedy != "chown -h root "+r.path("sticky/theirs") {
		t.Errorf("a symbolic link: %s", remedy)
	}
}

// TestCheckFileTakesPipes: nobody could replace a shell's <(command).
func TestCheckFileTakesPipes(t *testing.T) {
	rd, wr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer rd.Close()
	defer wr.Close()
	wants(t, "pipe", CheckFile(filepath.Join("/proc/self/fd", strconv.Itoa(int(rd.Fd())))))
}

func TestCheckFolder(t *testing.T) {
	r := newTree(t)
	r.folder("good", 0o755, 0)
	r.folder("plainsticky", os.ModeSticky|0o755, 0)
	r.folder("sticky", os.ModeSticky|0o777, 0)
	r.folder("sticky/good", 0o755, 0)
	r.folder("sticky/theirs", 0o755, stranger)
	r.folder("group", 0o775, 0)
	r.folder("foreign", 0o755, stranger)
	r.folder("foreign/good", 0o755, 0)
	for name, texts := range map[string][]string{
		"good": nil, "plainsticky": nil, "sticky/good": nil,
		"sticky":        {"has mode 1777", "may be first", "use a folder of its own"},
		"sticky/theirs": {"belongs to UID 1000"},
		"group":         {"has mode 0775", "chmod go-w"},
		"foreign":       {"belongs to UID 1000"},
		"foreign/good":  {"/foreign belongs to UID 1000, who can replace what is below it"},
		"missing":       {"no such file"},
	} {
		wants(t, name, CheckFolder(r.path(name)), texts...)
	}
}

func TestStickyAbove(t *testing.T) {
	r := newTree(t)
	r.folder("sticky", os.ModeSticky|0o777, 0)
	r.folder("sticky/good", 0o755, 0)
	r.folder("sticky/good/deep", 0o755, 0)
	r.folder("sticky/good/plainsticky", os.ModeSticky|0o755, 0)
	for path, want := range map[string]string{
		r.path("sticky/good"): r.path("sticky"), r.path("sticky/good/deep"): r.path("sticky"), r.path("sticky/good/plainsticky"): r.path("sticky"),
		"/proc/self": "", "/": "", r.path("missing"): "",
	} {
		if got := StickyAbove(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}
