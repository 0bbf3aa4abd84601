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
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
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

// resultsOf lists the types that each verb may print with -o json, in addition to a
// [failure].
var resultsOf = map[string][]any{
	"bootpolicy check":       {bootpolicy.Verdict{}, inspect.EvidenceVerdict{}},
	"bootpolicy diff":        {policyDiff{}},
	"bootpolicy evidence":    {savedEvidence{}},
	"bootpolicy explain":     {shownLog{}},
	"bootpolicy narrow":      {reseal.Narrowed{}},
	"bootpolicy record":      {shownPolicy{}},
	"bootpolicy show":        {shownPolicy{}},
	"bootstate add":          {admin.KeyringState{}},
	"bootstate list":         {[]inspect.StateReport{}},
	"bootstate revoke":       {admin.KeyringState{}},
	"bootstate sign":         {signedState{}},
	"cluster setup":          {clusteraccess.Result{}, clusterManifests{}},
	"encryption-config":      {encryptionconfig.EncryptionConfiguration{}, encryptionconfig.Report{}},
	"doctor":                 {diagnosis.Report{}},
	"kubeadm patch":          {kubeadmPatch{}},
	"init":                   {founding.InitResult{}},
	"join":                   {members.JoinResult{}},
	"keyring archive":        {writtenArchive{}},
	"keyring backup":         {backedUpKeyring{}},
	"keyring check":          {checkedKeyring{}},
	"keyring export":         {exportedKeyring{}},
	"keyring import":         {admin.KeyringState{}},
	"keyring import-archive": {admin.KeyringState{}},
	"keyring publish":        {admin.KeyringState{}},
	"keyring restore":        {admin.KeyringState{}},
	"keyring save":           {admin.KeyringState{}},
	"keyring show":           {shownKeyring{}},
	"keyring verify":         {admin.KeyringState{}},
	"migrate":                {migrate.Result{}},
	"node approve":           {admin.NodeApproval{}},
	"node identity":          {members.Identity{}},
	"node list":              {admin.NodeList{}},
	"node remove":            {admin.NodeRemoval{}},
	"pkcs11-pin":             {slots.SealedPIN{}},
	"prune":                  {admin.KeyringState{}},
	"recover":                {admin.KeyringState{}},
	"reseal":                 {admin.KeyringState{}, reseal.NextResult{}},
	"reset":                  {leaving.ResetResult{}},
	"rotate":                 {admin.KeyringState{}},
	"slot add":               {admin.KeyringState{}},
	"slot forget-copies":     {admin.KeyringState{}},
	"slot list":              {[]admin.SlotReport{}},
	"slot remove":            {admin.KeyringState{}},
	"slot rewrap":            {admin.KeyringState{}},
	"slot test":              {admin.SlotTests{}},
	"status":                 {admin.StatusReport{}},
	"suspend":                {admin.KeyringState{}},
	"usage":                  {usage.Usage{}},
	"vault-key":              {slots.VaultKey{}},
	"verifier init":          {verifierd.Report{}},
	"verifier register":      {verifierd.Node{}},
	"verifier show":          {verifierd.Report{}},
	"version":                {shownVersion{}},
}

// withoutResult are the verbs that print no object: servers, and verbs whose output is
// text by nature.
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

// checkJSON compares a command's output with -o json with the types that the command may
// print. The scripts' kleidi command calls it each time.
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
	if doc.unnamed != nil {
		t.Errorf("give each of these types a heading of its own in headings: %s", doc.unnamed)
	}
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
	types   []reflect.Type
	unnamed []string // types without a heading
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
		fmt.Fprintf(d, "\n### %s\n\n| member | value | |\n|---|---|---|\n", d.heading(t))
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

// headings are the headings of docs/json.md in words, by type.
var headings = map[string]string{
	"Verdict":                 "Verdict of a boot policy",
	"EvidenceVerdict":         "Verdict on saved evidence",
	"PolicyDiff":              "Difference of two boot policies",
	"SavedEvidence":           "Saved evidence",
	"ShownLog":                "Event log",
	"Narrowed":                "Narrowed boot policy",
	"ShownPolicy":             "Boot policy",
	"KeyringState":            "Keyring after a command",
	"StateReport":             "Signed boot state",
	"SignedState":             "New signed boot state",
	"Result":                  "Access to the cluster",
	"ClusterManifests":        "Manifests for access to the cluster",
	"Report":                  "Report of doctor",
	"EncryptionConfiguration": "EncryptionConfiguration",
	"EncryptionconfigReport":  "Step of a move to another provider",
	"InitResult":              "Result of init",
	"JoinResult":              "Result of join",
	"WrittenArchive":          "Written archive",
	"BackedUpKeyring":         "Backup of the keyring",
	"CheckedKeyring":          "Snapshots that a keyring opens",
	"ExportedKeyring":         "Exported keyring",
	"ShownKeyring":            "Stored keyring",
	"KubeadmPatch":            "Patch for kubeadm",
	"MigrateResult":           "Result of migrate",
	"NodeApproval":            "Approved node",
	"Identity":                "Identity of a machine",
	"NodeList":                "Nodes of the keyring",
	"UnusedApproval":          "Approval that no node has used",
	"NodeRemoval":             "Removal of a node",
	"SealedPIN":               "Sealed PIN",
	"NextResult":              "Predicted next boot",
	"ResetResult":             "Result of reset",
	"SlotReport":              "Slot of the current KEK",
	"SlotTests":               "Tests of slots",
	"StatusReport":            "Status of a node",
	"Usage":                   "Stored objects by key",
	"VaultKey":                "Key for Vault",
	"VerifierdReport":         "Configuration of a verifier",
	"Node":                    "Node that a verifier knows",
	"ShownVersion":            "Version of kleidi",
	"Failure":                 "Failure",
	"Finding":                 "Rule that does not hold",
	"Change":                  "Changed rule",
	"Row":                     "Event of a log",
	"Rotation":                "Rotation of several nodes",
	"DiagnosisFinding":        "Finding of doctor",
	"Unchecked":               "Check that was not made",
	"Resources":               "Entry of an EncryptionConfiguration",
	"Entries":                 "Entries at a step",
	"TokenSettings":           "Settings of a token",
	"Opening":                 "Snapshot and the keyring",
	"KEKInfo":                 "KEK in slots",
	"RetiredInfo":             "Retired KEK",
	"KeyringNode":             "Node in the keyring",
	"Slot":                    "Slot as it is stored",
	"Operation":               "Operation of a patch",
	"Migrated":                "Migrated resource",
	"NodeReport":              "Node in a list",
	"ClusterReport":           "Cluster store as a node sees it",
	"WaitingNode":             "Node that a rotation waits for",
	"Problem":                 "Problem",
	"SlotTest":                "Test of a slot",
	"KeyReport":               "KEK in the status",
	"Unrevoked":               "Former slot that still opens",
	"OutsideChange":           "Change of the slots from outside",
	"Suspension":              "Suspension",
	"AttestationReport":       "Attestation",
	"Store":                   "Store with its objects",
	"Provider":                "Provider of an EncryptionConfiguration",
	"Entry":                   "Entry without its keys",
	"SnapshotInfo":            "File of a snapshot",
	"KeyIDUse":                "Key ID and its objects",
	"SlotInfo":                "Slot in short",
	"NodeRecord":              "Last record of a node",
	"Resource":                "Resource and its objects",
	"KMS":                     "KMS plugin",
	"Count":                   "Objects under one key",
}

// heading returns the heading of a type's section, in words.
func (d *schema) heading(t reflect.Type) string {
	h := headings[d.title(t)]
	if h == "" {
		d.unnamed = append(d.unnamed, d.title(t))
	}
	return h
}

// title returns a type's name: StatusReport. The second type with the same
// name has its package before it.
func (d *schema) title(t reflect.Type) string {
	name := strings.ToUpper(t.Name()[:1]) + t.Name()[1:]
	first := slices.IndexFunc(d.types, func(o reflect.Type) bool { return strings.EqualFold(o.Name(), t.Name()) })
	if d.types[first] != t {
		pkg := path.Base(t.PkgPath())
		name = strings.ToUpper(pkg[:1]) + pkg[1:] + name
	}
	return name
}

// name describes a type, and lists the fields of a struct.
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
		return "string"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.name(t.Elem())
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return "base64"
		}
		return "list of " + plural(d.name(t.Elem()))
	case reflect.Map:
		return "object with " + d.name(t.Elem()) + " values"
	case reflect.Struct:
		if t.Name() == "" {
			return "empty object"
		}
		if !slices.Contains(d.types, t) {
			d.types = append(d.types, t)
		}
		h := d.heading(t)
		return "[" + h + "](#" + strings.ToLower(strings.ReplaceAll(h, " ", "-")) + ")"
	case reflect.String:
		return "string"
	case reflect.Bool:
		return "true or false"
	}
	return "number"
}

// plural is the plural of a type.
func plural(name string) string {
	if strings.HasPrefix(name, "[") {
		return name + " objects"
	}
	return name + "s"
}

// TestReadingVerbsExist: a renamed verb would claim a change that it can't make.
func TestReadingVerbsExist(t *testing.T) {
	all := append(verbs(newRoot()), withoutResult...)
	for _, v := range reading {
		if !slices.Contains(all, v) {
			t.Errorf("there is no kleidi %s", v)
		}
	}
}

// TestOneWriter: output that bypasses [results] could fail unnoticed.
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
// servers, cobra's own texts, and verbs that need a cluster store, an etcd, a snapshot,
// or a kube-apiserver. They share the writer with the others.
var notOnFullDisk = []string{"completion fish", "completion powershell", "completion zsh", "dev", "help", "keyring archive", "keyring check", "keyring import-archive", "keyring publish", "migrate", "prune", "serve", "usage"}

// TestEveryVerbOnFullDisk: a script runs each verb with a full standard output.
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
