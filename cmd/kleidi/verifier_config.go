package main

import (
	"github.com/beezy-dev/kleidi/internal/verifierd"
)

// verifierConfig reads the configuration that the flags name.
func (a *app) verifierConfig() (*verifierd.Config, error) {
	path := a.configPath
	if path == "" {
		path = verifierd.DefaultPath
	}
	c, err := verifierd.Load(path)
	if err == nil && a.logLevel != "" {
		err = c.Log.Level.UnmarshalText([]byte(a.logLevel))
	}
	return c, err
}
