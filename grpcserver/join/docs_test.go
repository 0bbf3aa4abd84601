package join_test

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/beezy-dev/kleidi/grpcserver/join"
	"github.com/beezy-dev/kleidi/internal/members"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

const protocolFile = "../../docs/join-protocol.md"

// TestDocumented compares the limits, the messages and the checks of the page with the
// code, both ways.
func TestDocumented(t *testing.T) {
	b, err := os.ReadFile(protocolFile)
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	limits := join.Limits()
	limits["an approval"], limits["an approval without `--expires`"] = fmt.Sprint(members.MaxExpiry), fmt.Sprint(members.DefaultExpiry)
	same(t, "limits", limits, table(t, page, "| item | at most |\n|---|---|\n", `(?m)^\| ([^|]+) \| ([^|]+) \|$`))
	same(t, "messages", messages(t), table(t, page, "| message | number | fields |\n|---|---|---|\n", `(?m)^\| ([^|]+ \| \d+) \|(.*)\|$`))
	if name, method := join.Service(); !strings.Contains(page, "The service is `"+name+"`, its method is `"+method+"`.") {
		t.Errorf("%s does not name the service %s and its method %s", protocolFile, name, method)
	}
	var checks []string
	for _, c := range append(joinproof.Checks(), join.CheckDone) {
		checks = append(checks, "`"+string(c)+"`")
	}
	if words := "A refusal names its check: " + strings.Join(checks, ", ") + "."; !strings.Contains(page, words) {
		t.Errorf("%s does not say %q", protocolFile, words)
	}
}

// TestDocumentedDone: the proof that J has opened the keyring is the documented one.
func TestDocumentedDone(t *testing.T) {
	b, err := os.ReadFile(protocolFile)
	if err != nil {
		t.Fatal(err)
	}
	label := ""
	for l, use := range table(t, string(b), "| label | use |\n|---|---|\n", `(?m)^\| `+"`([^`]+)`"+` \| ([^|]+) \|$`) {
		if use == "the proof that J has opened the keyring" {
			label = l
		}
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{{Type: "recovery", Data: []byte("{}")}}, []keyring.Node{{Name: "alpha"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	transcript, want := []byte("T"), []byte(nil)
	k.KEK().With(func(b []byte) {
		key, err := hkdf.Key(sha256.New, b, nil, label, sha256.Size)
		if err != nil {
			t.Error(err)
		}
		h := hmac.New(sha256.New, key)
		h.Write(transcript)
		want = h.Sum(nil)
	})
	if !bytes.Equal(k.JoinDone(transcript), want) {
		t.Errorf("the proof is not made with the label %q", label)
	}
}

// messages returns the fields of each message, by direction, name and number.
func messages(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for stream, direction := range map[string]string{"FromJoiner": "J→V", "FromVerifier": "V→J"} {
		all := join.Messages().ByName(protoreflect.Name(stream)).Fields()
		for i := range all.Len() {
			var fields []string
			inside := all.Get(i).Message().Fields()
			for j := range inside.Len() {
				fields = append(fields, fmt.Sprintf("`%s` %d", inside.Get(j).Name(), inside.Get(j).Number()))
			}
			out[fmt.Sprintf("%s `%s` | %d", direction, all.Get(i).Name(), all.Get(i).Number())] = strings.Join(fields, ", ")
		}
	}
	return out
}

// table returns the rows of the table with this head: the first group of the expression, and
// the second.
func table(t *testing.T, page, head, row string) map[string]string {
	t.Helper()
	_, rest, found := strings.Cut(page, head)
	if !found {
		t.Fatalf("%s has no table %s", protocolFile, head)
	}
	rest, _, _ = strings.Cut(rest, "\n\n")
	out := map[string]string{}
	for _, r := range regexp.MustCompile(row).FindAllStringSubmatch(rest, -1) {
		out[r[1]] = strings.TrimSpace(r[2])
	}
	return out
}

func same(t *testing.T, what string, code, page map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(code)) {
		if page[name] != code[name] {
			t.Errorf("%s: %s: %s: %q, and the code says %q", protocolFile, what, name, page[name], code[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(page)) {
		if _, is := code[name]; !is {
			t.Errorf("%s: %s: the code has no %s", protocolFile, what, name)
		}
	}
}
