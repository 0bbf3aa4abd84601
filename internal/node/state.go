package node

import (
	"context"
	"errors"
	"sync"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
)

// StateFolder is the state folder, which one process at a time may change. A serve
// without a keyring leaves it to init.
type StateFolder struct {
	dir string

	mu   sync.Mutex
	lock *store.Lock
}

// acquire takes the lock on the folder, once.
func (s *StateFolder) acquire() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock != nil {
		return nil
	}
	err := store.PrepareDir(s.dir)
	if err == nil {
		err = ownership.CheckFolder(s.dir) // this also checks every folder above it
	}
	if err == nil {
		s.lock, err = store.LockDir(s.dir)
	}
	return files.HintRoot(err)
}

// Held reports whether this process holds the lock on the folder.
func (s *StateFolder) Held() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lock != nil
}

// Release releases the lock, if this process holds it.
func (s *StateFolder) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock != nil {
		_ = s.lock.Close()
		s.lock = nil
	}
}

// File is a file in the state folder.
func (s *StateFolder) File(path string) LockedFile { return LockedFile{store.NewFile(path), s} }

// LockedFile is a file in the state folder that is changed only under the lock.
type LockedFile struct {
	*store.File
	state *StateFolder
}

// Load reads the file. Once the file exists, this process takes the lock. A read-only
// disk does not stop us from serving; another process holding the lock does.
func (f LockedFile) Load(ctx context.Context) ([]byte, store.Version, error) {
	b, version, err := f.File.Load(ctx)
	if err != nil {
		return nil, "", err
	}
	if err := ownership.CheckFolder(f.state.dir); err != nil { // this also checks every folder above it
		return nil, "", seal.Caused(seal.CauseStore, "", "the state folder", err)
	}
	if err := f.state.acquire(); errors.Is(err, store.ErrLocked) {
		return nil, "", seal.Errorf(seal.CauseStore, "kleidi tries again", "the state %w", err)
	}
	return b, version, nil
}

// Save takes the lock first.
func (f LockedFile) Save(ctx context.Context, b []byte, old store.Version) (store.Version, error) {
	if err := f.state.acquire(); err != nil {
		return "", err
	}
	return f.File.Save(ctx, b, old)
}

// readFreely is a LockedFile that is read without the lock.
type readFreely struct{ LockedFile }

// Load reads the file.
func (f readFreely) Load(ctx context.Context) ([]byte, store.Version, error) { return f.File.Load(ctx) }
