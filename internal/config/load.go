package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/internal/strictyaml"
)

// maxSize bounds a configuration file, in bytes.
const maxSize = 256 << 10

// Load reads the file at path. With an empty path it reads DefaultPath, which may be
// missing. Load checks the result of amend like the file's own content.
func Load(path string, amend ...func(*Config) error) (*Config, error) {
	name := path
	if path == "" {
		name = DefaultPath
	}
	c, p := Default(), &problems{}
	switch b, err := read(name); {
	case path == "" && errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("configuration: %w", err)
	default:
		if c, err = decode(b, p); err != nil {
			return nil, fmt.Errorf("configuration %s:\n%w", name, err)
		}
	}
	for _, f := range amend {
		if err := f(c); err != nil {
			return nil, err
		}
	}
	c, err := c.checked(p)
	if err != nil {
		return nil, fmt.Errorf("configuration %s:\n%w", name, err)
	}
	return c, nil
}

// read reads the file. Nobody else may change it, because it decides what kleidi loads,
// dials and believes.
func read(name string) ([]byte, error) {
	f, err := regular.OpenArgument(name)
	if err != nil {
		return nil, fmt.Errorf("%w; name another file with --config", err)
	}
	defer f.Close()
	if err := ownership.CheckOpen(f); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, maxSize+1))
}

// decode reads a configuration file. It adds the problems of the keys to p, which
// checked reports: one line for each problem, with the path of its key.
func decode(b []byte, p *problems) (*Config, error) {
	if len(b) > maxSize {
		return nil, fmt.Errorf("larger than %d KiB", maxSize>>10)
	}
	c := Default()
	c.APIVersion, c.Kind = "", ""
	p.Renamed = map[string]string{"pin": "anchor"}
	return c, strictyaml.Decode(b, c, &p.Problems)
}

// checked adds the problems of the values to the problems of the keys.
func (c *Config) checked(p *problems) (*Config, error) {
	p.validate(c)
	if err := p.Err(); err != nil {
		return nil, err
	}
	return c.resolve()
}

// resolve fills in values that depend on the machine.
func (c *Config) resolve() (*Config, error) {
	if c.Node != "" {
		return c, nil
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		return nil, fmt.Errorf("the machine has no host name (%w); set node", err)
	}
	c.Node = host
	return c, nil
}
