package bootstate_test

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

var (
	fp  = strings.Repeat("ab", 32)
	pol = strings.Repeat("cd", 32)
	sig = base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 256))
)

// in returns a file with one state, members of which are replaced or added.
func in(replace ...string) string {
	m := `{"sha256":[{"pcrs":[11],"pkfp":"` + fp + `","pol":"` + pol + `","sig":"` + sig + `"}]}`
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(m, replace[i]) {
			panic(replace[i])
		}
		m = strings.Replace(m, replace[i], replace[i+1], 1)
	}
	return m
}

// with adds members to the state.
func with(members string) string { return in(`"pcrs"`, members+`,"pcrs"`) }

func TestParseAccepts(t *testing.T) {
	for name, c := range map[string]struct {
		file   string
		states int
	}{
		"one":                     {in(), 1},
		"the same twice":          {in(`"sha256":[`, `"sha256":[`+strings.TrimSuffix(strings.TrimPrefix(in(), `{"sha256":[`), `]}`)+`,`), 1},
		"padding of a PE section": {in() + "\x00\x00\x00", 1},
		"white space":             {" \n" + in(`:`, " :\t") + "\n", 1},
		"upper case":              {in(pol, strings.ToUpper(pol)), 1},
		"PCRs out of order":       {in(`[11]`, `[11,4,7]`), 1},
		"a policyRef":             {with(`"ref":"` + fp + `"`), 1},
		"an empty policyRef":      {with(`"ref":""`), 1},
		"a note":                  {with(`"what":"kernel 6.12.9-1 é"`), 1},
		"unknown members":         {with(`"phase":{"name":["x"]}`), 1},
		"SHA-384":                 {in("sha256", "sha384"), 1},
		"SHA-1":                   {in("sha256", "sha1"), 0},
		"a bank to come":          {in("sha256", "sha3-256"), 0},
		"no banks":                {`{}`, 0},
		"an empty bank":           {`{"sha256":[]}`, 0},
		"null":                    {`{"sha256":null}`, 0},
	} {
		f, err := bootstate.Parse([]byte(c.file))
		if err != nil || len(f.States()) != c.states {
			t.Errorf("%s: %v, want %d states", name, err, c.states)
			continue
		}
		if again := parse(t, marshal(t, f)); !reflect.DeepEqual(again.States(), f.States()) {
			t.Errorf("%s: %v written and read again, %v before", name, again.States(), f.States())
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for name, c := range map[string]struct{ file, says string }{
		"nothing":                {"", "unexpected end"},
		"only padding":           {"\x00\x00", "unexpected end"},
		"not JSON":               {"pcrs: 11", "want the JSON that systemd-measure"},
		"an array":               {"[" + in() + "]", "want the JSON"},
		"something after it":     {in() + in(), "after top-level value"},
		"not UTF-8":              {with("\"what\":\"\xff\""), "not UTF-8"},
		"a bank twice":           {`{"sha256":[],"sha256":[]}`, "duplicate"},
		"a member twice":         {with(`"pol":"` + pol + `"`), "duplicate"},
		"other spelling":         {in(`"pol"`, `"Pol"`), "pol has 0 bytes"},
		"a bank that is no list": {`{"sha1":{}}`, "sha1 holds no list"},
		"an object for a bank":   {`{"sha256":{}}`, "sha256: "},
		"a string for a state":   {`{"sha256":["x"]}`, "sha256: "},
		"a null state":           {`{"sha256":[null]}`, "sha256[0]: pkfp"},
		"no PCRs":                {in(`[11]`, `[]`), "pcrs names no PCR"},
		"null PCRs":              {in(`[11]`, `null`), "pcrs names no PCR"},
		"PCR 24":                 {in(`[11]`, `[11,24]`), "PCR 24; want 0 to 23"},
		"PCR -1":                 {in(`[11]`, `[-1]`), "PCR -1"},
		"PCR 1.5":                {in(`[11]`, `[1.5]`), "sha256: "},
		"a PCR twice":            {in(`[11]`, `[11,4,11]`), "twice"},
		"short fingerprint":      {in(fp, fp[2:]), "pkfp"},
		"no fingerprint":         {in(fp, ""), "pkfp"},
		"odd digest":             {in(pol, pol[1:]), "pol is not hexadecimal"},
		"short digest":           {in(pol, pol[2:]), "pol has 31 bytes, want 32"},
		"long digest":            {in(pol, pol+"00"), "pol has 33 bytes, want 32"},
		"no signature":           {in(`,"sig":"`+sig+`"`, ""), "not signed; sign it with"},
		"not base64":             {in(sig, "*"+sig[1:]), "sig is not base64"},
		"loose base64":           {in(sig, sig[:len(sig)-3]+"x=="), "sig is not base64"},
		"long signature":         {in(sig, base64.StdEncoding.EncodeToString(make([]byte, 513))), "sig has 513 bytes"},
		"long policyRef":         {with(`"ref":"` + fp + `00"`), "ref has 33 bytes"},
		"policyRef not hex":      {with(`"ref":"xy"`), "ref is not hexadecimal"},
		"a number for it":        {with(`"ref":1`), "sha256: "},
		"long note":              {with(`"what":"` + strings.Repeat("é", 161) + `"`), "what has 161 characters"},
		"a note on two lines":    {with(`"what":"a\nb"`), "can't be shown"},
		"a terminal's escape":    {with(`"what":"\u001b[31m"`), "can't be shown"},
		"a right-to-left mark":   {with(`"what":"\u202e"`), "can't be shown"},
		"too large":              {in() + strings.Repeat(" ", bootstate.MaxSize), "want at most 524288"},
		"too deep":               {with(`"x":` + strings.Repeat("[", 20000)), "max depth"},
	} {
		if f, err := bootstate.Parse([]byte(c.file)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, %v, want %q", name, f, err, c.says)
		} else if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r == '\x7f' }) || len(err.Error()) > 400 {
			t.Errorf("%s: message %q", name, err)
		}
	}
}

// TestMarshal: the form is frozen, since other programs read it.
func TestMarshal(t *testing.T) {
	s := bootstate.State{Bank: crypto.SHA384, PCRs: []int{4, 11}, Digest: bytes.Repeat([]byte{0xcd}, 32), Ref: []byte{1, 2},
		Signature: []byte{0xfb, 0xff}, What: `6.12 <"x"&é>`}
	copy(s.KeyFingerprint[:], bytes.Repeat([]byte{0xab}, 32))
	want := `{"sha384":[{"pcrs":[4,11],"pkfp":"` + fp + `","pol":"` + pol + `","sig":"+/8=","ref":"0102","what":"6.12 <\"x\"&é>"}]}` + "\n"
	if got := string(marshal(t, file(t, s))); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := string(marshal(t, file(t))); got != "{}\n" {
		t.Errorf("no states: %q", got)
	}
}

// many returns n different states of the largest size that there is.
func many(n int) []bootstate.State {
	all := make([]bootstate.State, n)
	for i := range all {
		all[i] = bootstate.State{
			Bank: crypto.SHA384, Digest: bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 16), Ref: make([]byte, bootstate.MaxRef),
			Signature: make([]byte, 512), What: strings.Repeat("\U0001f511", bootstate.MaxWhat),
		}
		for p := range 24 {
			all[i].PCRs = append(all[i].PCRs, p)
		}
	}
	return all
}

// TestLimits: the maximum number of states of the largest size is written and read
// again; one more is refused both times.
func TestLimits(t *testing.T) {
	b := marshal(t, file(t, many(bootstate.MaxStates)...))
	if len(b) > bootstate.MaxSize {
		t.Errorf("%d bytes, more than %d", len(b), bootstate.MaxSize)
	}
	if n := len(parse(t, b).States()); n != bootstate.MaxStates {
		t.Errorf("%d states read", n)
	}
	if _, err := bootstate.New(many(bootstate.MaxStates + 1)...); err == nil || !strings.Contains(err.Error(), "more than 256 signed boot states; remove") {
		t.Errorf("New: %v", err)
	}
	var list []string
	for i := range bootstate.MaxStates + 1 {
		list = append(list, fmt.Sprintf(`{"pcrs":[11],"pkfp":"%s","pol":"%064x","sig":"AAAA"}`, fp, i))
	}
	if _, err := bootstate.Parse([]byte(`{"sha256":[` + strings.Join(list, ",") + `]}`)); err == nil || !strings.Contains(err.Error(), "more than 256 signed boot states") {
		t.Errorf("Parse: %v", err)
	}
}

func TestMergeRefuses(t *testing.T) {
	for name, change := range map[string]func(*bootstate.State){
		"bank":      func(s *bootstate.State) { s.Bank = crypto.SHA1 },
		"no bank":   func(s *bootstate.State) { s.Bank = 0 },
		"order":     func(s *bootstate.State) { s.PCRs = []int{7, 4} },
		"digest":    func(s *bootstate.State) { s.Digest = nil },
		"note":      func(s *bootstate.State) { s.What = "\xff" },
		"signature": func(s *bootstate.State) { s.Signature = nil },
	} {
		s := many(1)[0]
		change(&s)
		if _, err := bootstate.New(s); err == nil || !strings.HasPrefix(err.Error(), "boot state ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMergeSelectKeep: files are sets; none of the operations changes another
// file or shares memory with it.
func TestMergeSelectKeep(t *testing.T) {
	a, b := signers()["P-256"], signers()["RSA"]
	ref := bootstate.Ref([16]byte{1}, 1)
	old := sign(t, a, values(crypto.SHA256, 4, 11), ref, "old kernel")
	other := sign(t, b, values(crypto.SHA256, 4, 11), ref, "")
	wide := sign(t, a, values(crypto.SHA384, 4, 11), ref, "")
	systemds := sign(t, a, values(crypto.SHA256, 11), nil, "")
	f := file(t, wide, old, other, systemds)
	renamed := old
	renamed.What = "another note"
	again, err := f.Merge(renamed, sign(t, a, values(crypto.SHA256, 4, 9), ref, "new kernel"))
	if err != nil || len(again.States()) != 5 || len(f.States()) != 4 {
		t.Fatalf("%d states after the merge, %d before: %v", len(again.States()), len(f.States()), err)
	}
	if got := again.States()[0]; got.What != "old kernel" || got.Bank != crypto.SHA256 || again.States()[4].Bank != crypto.SHA384 {
		t.Errorf("states %v", again.States())
	}
	if got := f.Select(old.KeyFingerprint, ref); len(got) != 2 || got[0].What != "old kernel" || got[1].Bank != crypto.SHA384 {
		t.Errorf("selected %v", got)
	}
	if got := f.Select(old.KeyFingerprint, nil); len(got) != 1 || !reflect.DeepEqual(got[0].PCRs, []int{11}) {
		t.Errorf("selected without a policyRef: %v", got)
	}
	kept := f.Keep(func(s bootstate.State) bool { return s.Bank == crypto.SHA384 })
	if got := kept.States(); len(got) != 1 || got[0].Bank != crypto.SHA384 {
		t.Errorf("kept %v", got)
	}
	claims := old
	claims.Ref = nil // its signature is not over that, which nobody has looked at here
	if more, err := f.Merge(claims); err != nil || len(more.States()) != 5 {
		t.Errorf("a state with another policyRef: %v, %v", more, err)
	}
	f.States()[0].Digest[0] ^= 1
	old.Signature[0] ^= 1
	for _, s := range f.States() {
		if s.KeyFingerprint == old.KeyFingerprint && s.Verify(a.Public()) != nil {
			t.Errorf("%v changed from outside", s)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"systemd-252-rsa.json", "systemd-252-ecdsa.json", "systemd-252-pretty.json"} {
		f.Add(read(f, name))
	}
	for _, s := range []string{"", "{}", in(), with(`"ref":"00","what":"note"`), in() + "\x00", in("sha256", "sha1"), in(`[11]`, `[4,7,11]`)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := bootstate.Parse(b)
		if err != nil {
			return
		}
		states := file.States()
		if len(states) > bootstate.MaxStates {
			t.Fatalf("%d states", len(states))
		}
		written := marshal(t, file)
		again := parse(t, written)
		if !reflect.DeepEqual(again.States(), states) && len(states) > 0 {
			t.Fatalf("read again: %v, before: %v", again.States(), states)
		}
		if twice := marshal(t, again); !bytes.Equal(twice, written) {
			t.Fatalf("written again: %s, before: %s", twice, written)
		}
		for _, s := range states {
			_ = s.String()
			if s.Verify(signers()["P-256"].Public()) == nil {
				t.Fatalf("%v verifies by a key that signed nothing", s)
			}
		}
	})
}
