package strictyaml

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

type document struct {
	Name    string          `yaml:"name"`
	Flag    *bool           `yaml:"flag"`
	Numbers []int           `yaml:"numbers"`
	Lists   [][]string      `yaml:"lists"`
	After   time.Duration   `yaml:"after"`
	Level   level           `yaml:"level" want:"high or low"`
	Own     own             `yaml:"own"`
	Version version         `yaml:"version"`
	Table   map[int]element `yaml:"table"`
	Hidden  string
}

type element struct {
	Size int `yaml:"size"`
}

type level string

func (l *level) UnmarshalText(b []byte) error {
	if s := string(b); s != "high" && s != "low" {
		return errors.New("neither")
	}
	*l = level(b)
	return nil
}

// version is a struct that is written as text.
type version struct{ major, minor int }

func (v *version) UnmarshalText(b []byte) error {
	_, err := fmt.Sscanf(string(b), "%d.%d", &v.major, &v.minor)
	return err
}

type own struct{ value string }

func (o *own) UnmarshalNode(n *yaml.Node, path string, p *Problems) {
	if o.value = n.Value; n.Value == "bad" {
		p.Add(path, "line %d: bad", n.Line)
	}
}

func TestDecode(t *testing.T) {
	got := document{Name: "kept", Hidden: "kept"}
	p := &Problems{}
	err := Decode([]byte(`
flag: false
numbers: [1, 0x10]
lists: [[a, b], []]
after: 2s
level: low
own: x
version: "1.2"
table: {4: {size: 1}, 11: {}}
`), &got, p)
	if err = errors.Join(err, p.Err()); err != nil {
		t.Fatal(err)
	}
	want := document{Name: "kept", Hidden: "kept", Flag: new(bool), Numbers: []int{1, 16}, Lists: [][]string{{"a", "b"}, {}},
		After: 2 * time.Second, Level: "low", Own: own{"x"}, Version: version{1, 2}, Table: map[int]element{4: {1}, 11: {}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestProblems(t *testing.T) {
	for content, want := range map[string]string{
		"":                                 "file: it is empty",
		"# a comment\n":                    "file: it is empty",
		"- a":                              "file: line 1: want keys with values",
		"nmae: a":                          "nmae: line 1: unknown key",
		"Hidden: a":                        "Hidden: line 1: unknown key",
		"'': a":                            `"": line 1: unknown key`,
		"'100%d': a":                       "100%d: line 1: unknown key",
		"\"a\\e[2J\": a":                   `"a\x1b[2J": line 1: unknown key`,
		"name: a\nname: b":                 "name: line 2: duplicate key",
		"? [a]\n: b":                       "line 1: a key must be a word",
		"name: [a]":                        "name: line 1: want a string",
		"name:":                            "name: line 1: want a value of its own",
		"name: &a x\nown: *a":              "own: line 2: want a value of its own",
		"flag: maybe":                      "flag: line 1: want true or false, not \"maybe\"",
		"numbers: 5":                       "numbers: line 1: want a list of numbers",
		"numbers: [1, b, 3]":               "numbers[1]: line 1: want a number in range, not \"b\"",
		"numbers: [1, ~]":                  "numbers[1]: line 1: want a value of its own",
		"lists: [[a], b]":                  "lists[1]: line 1: want a list, not \"b\"",
		"after: soon":                      "after: line 1: want a duration (30s)",
		"level: middle":                    "level: line 1: want high or low, not \"middle\"",
		"own: bad":                         "own: line 1: bad",
		"table: [a]":                       "table: line 1: want keys with values",
		"table: {a: {}}":                   "table.a: line 1: the key must be a number",
		"table: {04: {}}":                  "table.04: line 1: the key must be a number",
		"table: {4: {}, 4: {}}":            "table.4: line 1: duplicate key",
		"table: {4: {size: x}}":            "table.4.size: line 1: want a number in range",
		"table: {4: {}}\n<<: {name: a}":    "<<: line 2: unknown key",
		"name: a\n---\nname: b":            "a second document follows",
		"name: a\n--- [":                   "a second document follows",
		"name: [":                          "yaml:",
		strings.Repeat("a: {", 20000):      "yaml:",
		"numbers: [" + rep("x,", 51) + "]": "and 1 more",
	} {
		var d document
		p := &Problems{}
		err := errors.Join(Decode([]byte(content), &d, p), p.Err())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %s", content, err, want)
		}
	}
}

func rep(s string, n int) string { return strings.Repeat(s, n) }

func TestAllProblemsAtOnce(t *testing.T) {
	var d document
	p := &Problems{}
	if err := Decode([]byte("nmae: a\nflag: x\ntable: {4: {size: x}}\nname: b"), &d, p); err != nil {
		t.Fatal(err)
	}
	if n := len(strings.Split(fmt.Sprint(p.Err()), "\n")); n != 3 {
		t.Errorf("%d problems, want 3:\n%v", n, p.Err())
	}
	if d.Name != "b" {
		t.Errorf("what is right is not read: %+v", d)
	}
}
