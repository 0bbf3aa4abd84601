package site

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Forgery is a row of hostile slot contents: a slot as changed by an attacker who can
// write the keyring's file but has no KEK, and the expected message.
type Forgery struct {
	Name  string
	Cause seal.Cause
	Says  []string
	// Make returns the data that replaces the slot's.
	Make func(slot seal.Slot) []byte
}

// Hostile runs rows on the slot of this type, and logs their results as a table. An
// open kleidi goes on, and does not overwrite a file that it does not trust. A kleidi
// that starts is locked and says why, and opens once the file is restored.
func (s *Site) Hostile(type_ string, rows []Forgery) {
	s.t.Helper()
	each(s, "hostile slots of "+type_, rows, func(row Forgery) (string, func() line) {
		return row.Name, func() line { return s.forge(row, type_) }
	})
}

func (s *Site) forge(row Forgery, type_ string) line {
	s.t.Helper()
	good := s.Stored()
	bad := forged(s.t, good, s.SlotOf(type_), row.Make(s.SlotOf(type_)))
	s.store(bad)
	s.Refuse("rotate", "changed by someone else")
	s.WaitSays(http.StatusOK, "ok")
	s.Decrypts()
	s.Restart()
	shown := s.isLocked(Fault{Cause: row.Cause, Says: row.Says})
	if !bytes.Equal(bad, s.Stored()) {
		s.t.Error("kleidi has written the keyring")
	}
	s.store(good)
	began := time.Now()
	s.WaitSays(http.StatusOK, "ok")
	s.Decrypts()
	s.Do("slot test", "opens")
	return s.line(row.Name, shown, "nothing written, open goes on", began)
}

// store replaces the keyring's file, as an attacker who can write the disk would.
func (s *Site) store(b []byte) {
	s.t.Helper()
	file := s.Path("state/keyring.json")
	if err := os.WriteFile(file+".new", b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		s.t.Fatal(err)
	}
}

// forged returns a keyring with other data in a slot, under the old MAC.
func forged(t *testing.T, stored []byte, slot seal.Slot, data []byte) []byte {
	t.Helper()
	var e struct {
		Body []byte `json:"body"`
		MAC  []byte `json:"mac"`
	}
	if err := json.Unmarshal(stored, &e); err != nil {
		t.Fatal(err)
	}
	body := bytes.Replace(e.Body, slot.Data, data, 1)
	if bytes.Equal(body, e.Body) {
		t.Fatal("nothing is forged")
	}
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `{"body":%q,"mac":%q}`+"\n", b64(body), b64(e.MAC))
}

// Edit returns a Make that edits the JSON object of a slot's data.
func Edit(edit func(d map[string]any)) func(seal.Slot) []byte {
	return func(slot seal.Slot) []byte {
		var d map[string]any
		if err := json.Unmarshal(slot.Data, &d); err != nil {
			panic(err)
		}
		edit(d)
		b, err := json.Marshal(d)
		if err != nil {
			panic(err)
		}
		return b
	}
}

// Oversized is valid JSON, one byte longer than kleidi reads.
func Oversized(seal.Slot) []byte {
	const empty = `{"form":""}`
	return []byte(strings.Replace(empty, `""`, `"`+strings.Repeat("a", seal.MaxSlotData+1-len(empty))+`"`, 1))
}
