package unlock

import (
	"maps"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// seedLife is how long kube-apiserver encrypts with a DEK seed after the last answer of
// kleidi that confirmed it (kmsv2PluginWriteDEKSourceMaxTTL).
const seedLife = 3 * time.Minute

// Callers notes under which KEK each connection of kube-apiserver encrypts. Each KMS
// provider of an EncryptionConfiguration has a connection of its own, on which it asks for
// the key ID once a minute. Until then it encrypts with its former DEK seed, even if another
// provider has changed its own.
type Callers struct {
	mu    sync.Mutex
	conns map[any]caller
	// changed is called after a change, without the lock.
	changed func()
}

// caller is a connection.
type caller struct {
	told      seal.KeyID // in the last answer, at the time at
	at        time.Time
	encrypted seal.KeyID // "" while the connection has seen no Encrypt and only one key ID
	confirmed time.Time  // of the last answer with the key ID encrypted
}

// Answered notes the key ID in an answer to Status or Encrypt on a connection.
func (c *Callers) Answered(conn any, id seal.KeyID, encrypted bool) {
	c.mu.Lock()
	before, known := c.conns[conn]
	if !known { // an answer may overtake the end of its connection, so forget old ones
		maps.DeleteFunc(c.conns, func(_ any, old caller) bool { return time.Since(old.at) > seedLife })
	}
	now := caller{told: id, at: time.Now(), encrypted: before.encrypted, confirmed: before.confirmed}
	switch {
	case encrypted:
		now.encrypted = id
	case known && now.encrypted == "" && before.told != id: // its seed may be from before this serve started
		now.encrypted, now.confirmed = before.told, before.at
	}
	if now.encrypted == id {
		now.confirmed = now.at
	}
	c.conns[conn] = now
	c.mu.Unlock()
	if before.told != now.told || before.encrypted != now.encrypted {
		c.changed()
	}
}

// Ended forgets a connection: whoever restarts kube-apiserver need not wait.
func (c *Callers) Ended(conn any) {
	c.mu.Lock()
	_, known := c.conns[conn]
	delete(c.conns, conn)
	c.mu.Unlock()
	if known {
		c.changed()
	}
}

// other returns the key ID of a KEK other than the current one under which a connection may
// still encrypt, or "" if there is none.
func (c *Callers) other(current seal.KeyID) seal.KeyID {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, is := range c.conns {
		switch {
		case time.Since(is.at) > seedLife:
		case is.told != current:
			return is.told
		case is.encrypted != "" && is.encrypted != current && time.Since(is.confirmed) <= seedLife:
			return is.encrypted
		}
	}
	return ""
}
