package unlock_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/beezy-dev/kleidi/seal/unlock"
)

// TestCallers: while any connection may encrypt under a former KEK, the last Encrypt does
// not count. A new key ID alone changes nothing: kube-apiserver must encrypt under it.
func TestCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := opened(t)
		id, err := n.CurrentID()
		if err != nil {
			t.Fatal(err)
		}
		c := unlock.CallersOf(n.Unlocker)
		noticed := func() bool {
			select {
			case <-unlock.NewlyEncrypted(n.Unlocker):
				return true
			default:
				return false
			}
		}
		c.Answered("first", "k1-former", true)
		c.Answered("second", "k1-former", true)
		c.Answered("third", "k1-former", false)
		if got := unlock.LastEncrypted(n.Unlocker); got != "" {
			t.Errorf("before an Encrypt: %s", got)
		}
		n.encrypt()
		noticed()
		for _, step := range []struct {
			name string
			do   func()
			want bool // all encrypt under the current KEK
		}{
			{"third ends", func() { c.Ended("third") }, false},
			{"first encrypts", func() { c.Answered("first", id, true) }, false},
			{"second is told", func() { c.Answered("second", id, false) }, false},
			{"second encrypts", func() { c.Answered("second", id, true) }, true},
			{"fourth is told another", func() { c.Answered("fourth", "k1-former", false) }, false},
			{"fourth is told", func() { c.Answered("fourth", id, false) }, false},
			{"fourth encrypts", func() { c.Answered("fourth", id, true) }, true},
			{"fifth encrypts under another", func() { c.Answered("fifth", "k1-former", true) }, false},
			{"fifth's seed expires", func() { time.Sleep(3*time.Minute + time.Second); c.Answered("sixth", id, true) }, true},
			{"seventh is told another, and then asks for the status alone", func() {
				c.Answered("seventh", "k1-former", false)
				c.Answered("seventh", id, false)
			}, false},
			{"seventh could have had a seed until now", func() {
				for range 4 {
					time.Sleep(time.Minute)
					c.Answered("seventh", id, false)
				}
				c.Answered("eighth", id, true)
			}, true},
		} {
			step.do()
			if got := unlock.LastEncrypted(n.Unlocker); (got == id) != step.want {
				t.Errorf("%s: %s", step.name, got)
			}
			if !noticed() {
				t.Errorf("%s: nobody notices", step.name)
			}
		}
		c.Answered("eighth", id, false)
		c.Ended("fifth") // which is forgotten
		if noticed() {
			t.Error("nothing has changed")
		}
	})
}
