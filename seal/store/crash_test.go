package store_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal/store"
)

// childEnv has the test binary save in a loop until it is killed.
const childEnv = "KLEIDI_STORE_TEST_SAVE"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		saveForEver(path)
	}
	os.Exit(m.Run())
}

// content returns generation n of a file. It is long, so that half a write shows.
func content(n int) []byte { return bytes.Repeat([]byte(strconv.Itoa(n)+"\n"), 4000) }

// saveForEver saves one generation after the other, and writes the number of each
// to standard output once it is saved.
func saveForEver(path string) {
	f := store.NewFile(path)
	b, v, err := f.Load(context.Background())
	if err != nil {
		panic(err)
	}
	for n := generation(b) + 1; ; n++ {
		if v, err = f.Save(context.Background(), content(n), v); err != nil {
			panic(err)
		}
		os.Stdout.WriteString(strconv.Itoa(n) + "\n")
	}
}

// generation returns n if b is content(n), and -1 if b is no whole content.
func generation(b []byte) int {
	first, _, _ := strings.Cut(string(b), "\n")
	n, err := strconv.Atoi(first)
	if err != nil || !bytes.Equal(b, content(n)) {
		return -1
	}
	return n
}

// TestKilledWhileSaving kills a saving process at many moments. The file then holds
// the last announced generation or the next one, and the previous file the one
// before that.
func TestKilledWhileSaving(t *testing.T) {
	dir := stateDir(t)
	path := filepath.Join(dir, "keyring.json")
	f := store.NewFile(path)
	if _, err := f.Save(t.Context(), content(1), ""); err != nil {
		t.Fatal(err)
	}
	for round := range 40 {
		announced := runAndKill(t, path, round%7+1)
		b, v, err := f.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n := generation(b)
		if n != announced && n != announced+1 {
			t.Fatalf("generation %d after %d was announced", n, announced)
		}
		previous, err := f.Previous(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// Both names are of the same file if the process was killed between its two
		// renames.
		if p := generation(previous); p != n-1 && p != n {
			t.Fatalf("previous is generation %d, the file is %d", p, n)
		}
		if _, err := f.Save(t.Context(), content(n+1), v); err != nil {
			t.Fatal(err)
		}
		onlyFiles(t, dir, "keyring.json", "keyring.json.previous")
	}
}

// runAndKill kills a saving process once it has announced count generations, and
// returns the last generation that it announced.
func runAndKill(t *testing.T, path string, count int) (announced int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var all []byte
	buf := make([]byte, 256)
	for bytes.Count(all, []byte("\n")) < count {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, buf[:n]...)
	}
	cmd.Process.Kill()
	for {
		n, err := out.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil {
			break
		}
	}
	cmd.Wait()
	lines := strings.Fields(string(all))
	announced, err = strconv.Atoi(lines[len(lines)-1])
	if err != nil {
		t.Fatal(err)
	}
	return announced
}

func onlyFiles(t testing.TB, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the folder holds %v, want %v", got, want)
	}
}

// TestCrashPoints lays out the folder as a crash after each step of a save leaves
// it. The file loads, and the next save succeeds and removes the leftovers.
func TestCrashPoints(t *testing.T) {
	const tmp, link = ".keyring.json.tmp-AAAA", ".keyring.json.tmp-BBBB"
	write := func(name, s string) func(dir string) error {
		return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), []byte(s), 0o600) }
	}
	hardLink := func(from, to string) func(dir string) error {
		return func(dir string) error { return os.Link(filepath.Join(dir, from), filepath.Join(dir, to)) }
	}
	rename := func(from, to string) func(dir string) error {
		return func(dir string) error { return os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)) }
	}
	steps := []func(dir string) error{
		write(tmp, ""), write(tmp, "th"), write(tmp, "three"), // created, half written, flushed
		hardLink("keyring.json", link), rename(link, "keyring.json.previous"), rename(tmp, "keyring.json"),
	}
	for n := range len(steps) + 1 {
		dir := stateDir(t)
		f := store.NewFile(filepath.Join(dir, "keyring.json"))
		save(t, f, "two", save(t, f, "one", ""))
		for _, step := range steps[:n] {
			if err := step(dir); err != nil {
				t.Fatal(err)
			}
		}
		want, previous := "two", "one"
		if n >= 5 {
			previous = "two"
		}
		if n == 6 {
			want = "three"
		}
		v := expect(t, f, want)
		if b, err := f.Previous(t.Context()); err != nil || string(b) != previous {
			t.Errorf("after step %d: previous is %q, %v; want %q", n, b, err, previous)
		}
		save(t, f, "four", v)
		expect(t, f, "four")
		if b, err := f.Previous(t.Context()); err != nil || string(b) != want {
			t.Errorf("after step %d and a save: previous is %q, %v", n, b, err)
		}
		onlyFiles(t, dir, "keyring.json", "keyring.json.previous")
	}
}

// TestCrashOfTheFirstSave: a crash during the first save leaves no file.
func TestCrashOfTheFirstSave(t *testing.T) {
	dir := stateDir(t)
	f := store.NewFile(filepath.Join(dir, "keyring.json"))
	if err := os.WriteFile(filepath.Join(dir, ".keyring.json.tmp-AAAA"), []byte("on"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Load(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	save(t, f, "one", "")
	if _, err := f.Previous(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("previous: %v", err)
	}
	onlyFiles(t, dir, "keyring.json")
}

// TestOtherFilesStay: a save removes no other file of the folder. The anchor lives
// there, with its own leftovers.
func TestOtherFilesStay(t *testing.T) {
	dir := stateDir(t)
	names := []string{".anchor.json.tmp-AAAA", ".keyring.json", "anchor.json", "keyring.json", "keyring.json.tmp-x"}
	for _, name := range names {
		if name != "keyring.json" {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	save(t, store.NewFile(filepath.Join(dir, "keyring.json")), "one", "")
	onlyFiles(t, dir, names...)
}
