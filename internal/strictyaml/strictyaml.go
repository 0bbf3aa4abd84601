// Package strictyaml reads a YAML document into a struct, strictly. It refuses unknown
// and duplicate keys, nulls, aliases and wrong types, and reports all of them at once,
// each with the path of its key and its line. The strict mode of yaml.v3 stops at the
// first type error of a mapping and names no paths.
package strictyaml

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxProblems bounds the list: nobody reads more, and a hostile document could have any
// number of problems.
const maxProblems = 50

// Problems collects the problems of a document.
type Problems struct {
	// Renamed maps the path of a renamed key to its present name.
	Renamed map[string]string

	list []error
	more int
}

// Add notes a problem with the value at path.
func (p *Problems) Add(path, format string, args ...any) {
	if len(p.list) == maxProblems {
		p.more++
		return
	}
	p.list = append(p.list, fmt.Errorf("  %s: %w", path, fmt.Errorf(format, args...)))
}

// Err returns all problems, one line for each, or nil if there are none.
func (p *Problems) Err() error {
	if p.more > 0 {
		return errors.Join(append(p.list[:len(p.list):len(p.list)], fmt.Errorf("  and %d more", p.more))...)
	}
	return errors.Join(p.list...)
}

// Unmarshaler is a type that reads its node itself. An alias or null never gets there.
type Unmarshaler interface {
	UnmarshalNode(n *yaml.Node, path string, p *Problems)
}

// Decode fills the struct that into points to from the only document in b, whose size the
// caller bounds. It keeps fields that the document does not name. The tag yaml names a
// field; the tag want may describe the expected form of a scalar. Maps have keys that are
// strings or int. Decode returns an error only if b is not one YAML document at all; all
// other problems are in p.
func Decode(b []byte, into any, p *Problems) error {
	var doc yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(b))
	switch err := d.Decode(&doc); {
	case errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0:
		p.Add("file", "it is empty")
		return nil
	case err != nil:
		return err
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return errors.New("a second document follows the first; want one document")
	}
	p.mapping(doc.Content[0], reflect.ValueOf(into).Elem(), "")
	return nil
}

// mapping fills a struct; prefix is the path of its keys, with a dot.
func (p *Problems) mapping(n *yaml.Node, v reflect.Value, prefix string) {
	p.EachKey(n, strings.TrimSuffix(prefix, "."), func(key, value *yaml.Node, path string) {
		field, want, ok := fieldOf(v, key.Value)
		if now, renamed := p.Renamed[path]; !ok && renamed {
			p.Add(path, "line %d: this key is named %s now; rename it", key.Line, now)
			return
		}
		if !ok {
			p.Add(path, "line %d: unknown key", key.Line)
			return
		}
		p.value(value, field, path, want)
	})
}

// EachKey calls f with each key of a mapping at path, its value and its path. For a
// duplicate key it calls f only with the first one.
func (p *Problems) EachKey(n *yaml.Node, path string, f func(key, value *yaml.Node, path string)) {
	if n.Kind != yaml.MappingNode {
		if path == "" {
			path = "file"
		}
		p.Add(path, "line %d: want keys with values", n.Line)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		switch {
		case key.Kind != yaml.ScalarNode:
			p.Add(at, "line %d: a key must be a word", key.Line)
		case seen[key.Value]:
			p.Add(at, "line %d: duplicate key", key.Line)
		default:
			seen[key.Value] = true
			f(key, value, at)
		}
	}
}

// join appends a key to a path. It quotes a key that comes from the document, because the
// path goes to a terminal.
func join(path, key string) string {
	if key == "" || len(key) > 64 || strings.ContainsFunc(key, func(r rune) bool { return !unicode.IsPrint(r) || r == ' ' || r == utf8.RuneError }) {
		key = strconv.Quote(key[:min(len(key), 64)])
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

func (p *Problems) value(n *yaml.Node, v reflect.Value, path, want string) {
	_, text := v.Addr().Interface().(encoding.TextUnmarshaler)
	own, isOwn := v.Addr().Interface().(Unmarshaler)
	absent := n.Kind == yaml.AliasNode || n.Tag == "!!null"
	switch {
	case v.Kind() == reflect.Struct && !text && !isOwn:
		p.mapping(n, v, path+".")
	case absent:
		p.Add(path, "line %d: want a value of its own", n.Line)
	case isOwn:
		own.UnmarshalNode(n, path, p)
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		p.value(n, v.Elem(), path, want)
	case v.Kind() == reflect.Map:
		p.table(n, v, path)
	case v.Kind() == reflect.Slice && !text:
		p.sequence(n, v, path, want)
	case n.Kind != yaml.ScalarNode || n.Decode(v.Addr().Interface()) != nil:
		p.Add(path, "line %d: want %s, not %q", n.Line, wanted(v, want), n.Value)
	}
}

func (p *Problems) sequence(n *yaml.Node, v reflect.Value, path, want string) {
	if n.Kind != yaml.SequenceNode {
		p.Add(path, "line %d: want %s, not %q", n.Line, wanted(v, want), n.Value)
		return
	}
	list := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, element := range n.Content {
		p.value(element, list.Index(i), fmt.Sprintf("%s[%d]", path, i), want)
	}
	v.Set(list)
}

func (p *Problems) table(n *yaml.Node, v reflect.Value, path string) {
	v.Set(reflect.MakeMap(v.Type()))
	p.EachKey(n, path, func(key, value *yaml.Node, at string) {
		k, element := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		if k.Kind() == reflect.Int {
			i, err := strconv.Atoi(key.Value)
			if err != nil || strconv.Itoa(i) != key.Value { // 04 would duplicate 4
				p.Add(at, "line %d: the key must be a number", key.Line)
				return
			}
			k.SetInt(int64(i))
		} else {
			k.SetString(key.Value)
		}
		p.value(value, element, at, "")
		v.SetMapIndex(k, element)
	})
}

// wanted describes the expected form of a value.
func wanted(v reflect.Value, want string) string {
	switch {
	case want != "":
		return want
	case v.Type().String() == "time.Duration":
		return "a duration (30s)"
	}
	switch v.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		switch v.Type().Elem().Kind() {
		case reflect.Int, reflect.Uint32:
			return "a list of numbers"
		}
		return "a list"
	default:
		return "a number in range"
	}
}

func fieldOf(v reflect.Value, key string) (field reflect.Value, want string, ok bool) {
	for i := range v.NumField() {
		if tag := v.Type().Field(i).Tag; key != "" && tag.Get("yaml") == key {
			return v.Field(i), tag.Get("want"), true
		}
	}
	return reflect.Value{}, "", false
}
