package main

import (
	"context"
	"errors"
	"sync"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
)

// state is the state folder, which one process at a time may change. A serve
// that has no keyring yet leaves it to init.
type state struct {
	dir string

	mu   sync.Mutex
	lock *store.Lock
}

// acquire takes the lock on the folder, once.
func (s *state) acquire() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock != nil {
		return nil
	}
	err := store.PrepareDir(s.dir)
	if err == nil {
		s.lock, err = store.LockDir(s.dir)
	}
	return requireRoot(err)
}

func (s *state) held() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lock != nil
}

func (s *state) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock != nil {
		_ = s.lock.Close()
		s.lock = nil
	}
}

// lockedFile is a file in the state folder that is changed under the lock alone.
type lockedFile struct {
	*store.File
	state *state
}

// file is a file in the state folder.
func (s *state) file(path string) lockedFile { return lockedFile{store.NewFile(path), s} }

// Load reads the file; once there is one, this process takes the lock. A read-only
// disk does not stop us from serving; another process holding the lock does.
func (f lockedFile) Load(ctx context.Context) ([]byte, store.Version, error) {
	b, version, err := f.File.Load(ctx)
	if err != nil {
		return nil, "", err
	}
	if err := f.state.acquire(); errors.Is(err, store.ErrLocked) {
		return nil, "", seal.Errorf(seal.CauseStore, "kleidi tries again", "the state %w", err)
	}
	return b, version, nil
}

// Save takes the lock first.
func (f lockedFile) Save(ctx context.Context, b []byte, old store.Version) (store.Version, error) {
	if err := f.state.acquire(); err != nil {
		return "", err
	}
	return f.File.Save(ctx, b, old)
}
