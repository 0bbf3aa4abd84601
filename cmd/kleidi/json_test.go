package main

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/founding"
	"github.com/beezy-dev/kleidi/internal/inspect"
	"github.com/beezy-dev/kleidi/internal/leaving"
	"github.com/beezy-dev/kleidi/internal/members"
	"github.com/beezy-dev/kleidi/internal/migrate"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/internal/verifierd"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

// resultsOf are what each verb prints with -o json: one of these, or a [failure].
var resultsOf = map[string][]any{
	"bootpolicy check":    {bootpolicy.Verdict{}, inspect.EvidenceVerdict{}},
	"bootpolicy diff":     {policyDiff{}},
	"bootpolicy evidence": {savedEvidence{}},
	"bootpolicy explain":  {shownLog{}},
	"bootpolicy narrow":   {reseal.Narrowed{}},
	"bootpolicy record":   {shownPolicy{}},
	"bootpolicy show":     {shownPolicy{}},
	"bootstate add":       {admin.KeyringState{}},
	"bootstate list":      {[]stateReport{}},
	"bootstate revoke":    {admin.KeyringState{}},
	"bootstate sign":      {signedState{}},
	"cluster setup":       {clusteraccess.Result{}, clusterManifests{}},
	"encryption-config":   {encryptionconfig.EncryptionConfiguration{}},
	"doctor":              {doctor.Report{}},
	"kubeadm patch":       {kubeadmPatch{}},
	"init":                {founding.InitResult{}},
	"join":                {members.JoinResult{}},
	"keyring backup":      {backedUpKeyring{}},
	"keyring check":       {checkedKeyring{}},
	"keyring export":      {exportedKeyring{}},
	"keyring import":      {admin.KeyringState{}},
	"keyring publish":     {admin.KeyringState{}},
	"keyring restore":     {admin.KeyringState{}},
	"keyring save":        {admin.KeyringState{}},
	"keyring show":        {shownKeyring{}},
	"keyring verify":      {admin.KeyringState{}},
	"migrate":             {migrate.Result{}},
	"node approve":        {admin.NodeApproval{}},
	"node identity":       {members.Identity{}},
	"node list":           {admin.NodeList{}},
	"node remove":         {admin.NodeRemoval{}},
	"pkcs11-pin":          {slots.SealedPIN{}},
	"prune":               {admin.KeyringState{}},
	"recover":             {admin.KeyringState{}},
	"reseal":              {admin.KeyringState{}, reseal.NextResult{}},
	"reset":               {leaving.ResetResult{}},
	"rotate":              {admin.KeyringState{}},
	"slot add":            {admin.KeyringState{}},
	"slot forget-copies":  {admin.KeyringState{}},
	"slot list":           {[]admin.SlotReport{}},
	"slot remove":         {admin.KeyringState{}},
	"slot rewrap":         {admin.KeyringState{}},
	"slot test":           {admin.SlotTests{}},
	"status":              {admin.StatusReport{}},
	"suspend":             {admin.KeyringState{}},
	"usage":               {usage.Usage{}},
	"vault-key":           {slots.VaultKey{}},
	"verifier init":       {verifierd.Report{}},
	"verifier register":   {verifierd.Node{}},
	"verifier show":       {verifierd.Report{}},
	"version":             {shownVersion{}},
}

// withoutResult are the verbs that print no object: servers, and what is text by its nature.
var withoutResult = []string{"completion bash", "completion fish", "completion powershell", "completion zsh", "dev", "help", "serve", "verifier"}

// verbs returns every command that does something, by its name without kleidi.
func verbs(cmd *cobra.Command) (all []string) {
	for _, c := range cmd.Commands() {
		if len(c.Commands()) == 0 || c.Name() == "verifier" {
			all = append(all, strings.TrimPrefix(c.CommandPath(), "kleidi "))
		}
		all = append(all, verbs(c)...)
	}
	return all
}

// checkJSON holds what a command has printed with -o json to what it may print. The scripts'
// kleidi command calls it each time.
func checkJSON(args []string, stdout string) error {
	if at := slices.Index(args, "-o"); at < 0 || at+1 >= len(args) || args[at+1] != "json" {
		return nil
	}
	root := newRoot()
	cmd, _, err := root.Find(args)
	if err != nil {
		return nil // a misspelt verb
	}
	verb := strings.TrimPrefix(cmd.CommandPath(), "kleidi ")
	if stdout == "" || verb == "bootstate sign" && !strings.Contains(strings.Join(args, " "), "--out") { // the file itself
		return nil
	}
	var errs error
	for _, result := range append(resultsOf[verb], failure{}) {
		d := json.NewDecoder(strings.NewReader(stdout))
		d.DisallowUnknownFields()
		err := d.Decode(reflect.New(reflect.TypeOf(result)).Interface())
		if err == nil && !d.More() {
			return nil
		}
		errs = errors.Join(errs, fmt.Errorf("%T: %w", result, err))
	}
	return fmt.Errorf("kleidi %s -o json prints none of its results: %w\n%s", verb, errs, stdout)
}

var update = flag.Bool("update", false, "write docs/json.md")

// TestResultsAreDocumented: docs/json.md lists every verb and every field.
func TestResultsAreDocumented(t *testing.T) {
	for _, v := range verbs(newRoot()) {
		if (resultsOf[v] == nil) == !slices.Contains(withoutResult, v) {
			t.Errorf("kleidi %s: name its result in resultsOf, or the verb in withoutResult", v)
		}
	}
	var doc schema
	file := filepath.Join("..", "..", "docs", "json.md")
	was, err := os.ReadFile(file)
	if err != nil && !*update {
		t.Fatal(err)
	}
	const mark = "<!-- written by go test ./cmd/kleidi -run ResultsAreDocumented -update -->\n"
	head, _, _ := bytes.Cut(was, []byte(mark))
	doc.Write(head)
	doc.WriteString(mark)
	doc.verbs()
	if *update {
		if err := os.WriteFile(file, doc.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if !*update && !bytes.Equal(was, doc.Bytes()) {
		t.Error("docs/json.md is not of this code; run go test ./cmd/kleidi -run ResultsAreDocumented -update")
	}
}

// schema is the part of docs/json.md that is made from the types.
type schema struct {
	bytes.Buffer
	types []reflect.Type
}

func (d *schema) verbs() {
	fmt.Fprintf(d, "\n| command | result |\n|---|---|\n")
	for _, v := range slices.Sorted(maps.Keys(resultsOf)) {
		var names []string
		for _, r := range resultsOf[v] {
			names = append(names, d.name(reflect.TypeOf(r)))
		}
		fmt.Fprintf(d, "| `kleidi %s` | %s |\n", v, strings.Join(names, ", or "))
	}
	d.name(reflect.TypeOf(failure{}))
	for i := 0; i < len(d.types); i++ {
		t := d.types[i]
		fmt.Fprintf(d, "\n### %s\n\n| member | value | |\n|---|---|---|\n", d.title(t))
		d.fields(t)
	}
}

func (d *schema) fields(t reflect.Type) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	for i := range t.NumField() {
		f := t.Field(i)
		tag := f.Tag.Get("json")
		name, options, _ := strings.Cut(tag, ",")
		if f.Anonymous && name == "" {
			d.fields(f.Type)
			continue
		}
		if name == "-" || !f.IsExported() {
			continue
		}
		if name == "" {
			name = f.Name
		}
		note := ""
		if strings.Contains(options, "omit") {
			note = "may be missing"
		}
		fmt.Fprintf(d, "| `%s` | %s | %s |\n", name, d.name(f.Type), note)
	}
}

// title is a type's name as a heading: StatusReport. The second type of a name has its
// package before it.
func (d *schema) title(t reflect.Type) string {
	name := strings.ToUpper(t.Name()[:1]) + t.Name()[1:]
	first := slices.IndexFunc(d.types, func(o reflect.Type) bool { return strings.EqualFold(o.Name(), t.Name()) })
	if d.types[first] != t {
		pkg := path.Base(t.PkgPath())
		name = strings.ToUpper(pkg[:1]) + pkg[1:] + name
	}
	return name
}

// name describes a type, and has the fields of a struct listed.
func (d *schema) name(t reflect.Type) string {
	text := reflect.TypeFor[encoding.TextMarshaler]()
	switch {
	case t == reflect.TypeFor[time.Time]():
		return "time, RFC 3339"
	case t == reflect.TypeFor[time.Duration]():
		return "nanoseconds"
	case t == reflect.TypeFor[json.RawMessage]():
		return "any JSON"
	case t.Implements(text) || reflect.PointerTo(t).Implements(text):
		return "text"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.name(t.Elem())
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return "base64"
		}
		return "list of " + d.name(t.Elem())
	case reflect.Map:
		return "object of " + d.name(t.Elem())
	case reflect.Struct:
		if t.Name() == "" {
			return "empty object"
		}
		if !slices.Contains(d.types, t) {
			d.types = append(d.types, t)
		}
		return "[" + d.title(t) + "](#" + strings.ToLower(d.title(t)) + ")"
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	}
	return "number"
}

// TestReadingVerbsExist: a verb that got another name would claim a change that it can't make.
func TestReadingVerbsExist(t *testing.T) {
	all := append(verbs(newRoot()), withoutResult...)
	for _, v := range reading {
		if !slices.Contains(all, v) {
			t.Errorf("there is no kleidi %s", v)
		}
	}
}

// TestOneWriter: what a verb prints past [results] could fail unnoticed.
func TestOneWriter(t *testing.T) {
	for _, pattern := range []string{"*.go", "../../internal/*/*.go"} {
		sources, err := filepath.Glob(pattern)
		if err != nil || len(sources) == 0 {
			t.Fatal(pattern, err)
		}
		for _, file := range sources {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			past := bytes.Contains(b, []byte("os.Stdout")) || bytes.Contains(b, []byte("fmt.Print"))
			if past && file != "main.go" && !strings.HasSuffix(file, "_test.go") {
				t.Errorf("%s writes to standard output itself; take cmd.OutOrStdout", file)
			}
		}
	}
}

// notOnFullDisk are the verbs that no script runs with a full disk for standard output:
// servers, text of cobra's, and those that want a cluster store, an etcd, a snapshot of one, or a kube-apiserver. They share
// the writer with the others.
var notOnFullDisk = []string{"completion fish", "completion powershell", "completion zsh", "dev", "help", "keyring check", "keyring publish", "migrate", "prune", "serve", "usage"}

// TestEveryVerbOnFullDisk: a script runs each verb with a standard output that is full.
func TestEveryVerbOnFullDisk(t *testing.T) {
	var all strings.Builder
	for _, script := range []string{"results", "results_full"} {
		b, err := os.ReadFile(filepath.Join("testdata", "script", script+".txtar"))
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	for _, v := range verbs(newRoot()) {
		tried := regexp.MustCompile(`full\.sh ('[^']*' )?(--config \S+ )?` + v + `\b`)
		if v == "verifier" { // a server, with verbs below it
			continue
		}
		if tried.MatchString(all.String()) == slices.Contains(notOnFullDisk, v) {
			t.Errorf("kleidi %s: run it with full.sh in a script, or name it in notOnFullDisk", v)
		}
	}
}
