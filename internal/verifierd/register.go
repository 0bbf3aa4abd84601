package verifierd

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/files"
)

// Register edits the file, and keeps its comments.
func (c *Config) Register(n Node, replace bool) error {
	var err error
	if n.BootPolicy, err = filepath.Abs(n.BootPolicy); err != nil {
		return err
	}
	if _, err := files.ReadBootPolicy(n.BootPolicy); err != nil {
		return err
	}
	b, err := files.ReadOwned(c.path, maxConfig)
	if err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return err
	}
	if err := setNode(&doc, n, replace); err != nil {
		return err
	}
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(&doc), e.Close()); err != nil {
		return err
	}
	if _, err := parse(out.Bytes()); err != nil {
		return fmt.Errorf("the configuration would not be valid:\n%w", err)
	}
	return files.Replace(c.path, out.Bytes())
}

// setNode puts a node into the sequence at nodes, of a document that was parsed.
func setNode(doc *yaml.Node, n Node, replace bool) error {
	var entry yaml.Node
	if err := entry.Encode(n); err != nil {
		return err
	}
	top := doc.Content[0]
	for i := 0; i+1 < len(top.Content); i += 2 {
		if top.Content[i].Value != "nodes" {
			continue
		}
		list := top.Content[i+1]
		list.Style = 0
		for k, old := range list.Content {
			var known Node
			if old.Decode(&known) != nil || known.Name != n.Name {
				continue
			}
			if !replace {
				return fmt.Errorf("node %q is registered already; add --replace to replace it", n.Name)
			}
			list.Content[k] = &entry
			return nil
		}
		list.Content = append(list.Content, &entry)
		return nil
	}
	top.Content = append(top.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: "nodes"}, &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{&entry}})
	return nil
}
