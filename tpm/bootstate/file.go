package bootstate

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"unicode/utf8"

	kjson "sigs.k8s.io/json"
)

// File is a set of states.
type File struct {
	states []State
}

// entry is a state in a file.
type entry struct {
	PCRs []int  `json:"pcrs"`
	PKFP string `json:"pkfp"`
	Pol  string `json:"pol"`
	Sig  string `json:"sig"`
	Ref  string `json:"ref,omitempty"`
	What string `json:"what,omitempty"`
}

// Parse reads a file. It refuses a file larger than MaxSize or with more than MaxStates
// states, duplicate members, members of a wrong type or size, and trailing bytes other
// than the zeros that pad a section of a PE file. It skips banks that nothing is sealed
// to. Like systemd it ignores unknown members, because a newer systemd must not lock a
// node out. They can't make a state valid, because the TPM verifies each signature.
// Parse itself verifies no signature.
func Parse(b []byte) (*File, error) {
	b = bytes.TrimRight(b, "\x00")
	switch {
	case len(b) > MaxSize:
		return nil, fmt.Errorf("%d bytes of signed boot states, want at most %d; remove those of kernels that are gone", len(b), MaxSize)
	case !utf8.Valid(b):
		return nil, fmt.Errorf("signed boot states are not UTF-8; want the JSON that systemd-measure or kleidi bootstate writes")
	}
	var raw map[string]json.RawMessage
	if err := decode(b, &raw); err != nil {
		return nil, fmt.Errorf("signed boot states: %w; want the JSON that systemd-measure or kleidi bootstate writes", err)
	}
	f := &File{}
	for _, known := range banks {
		if err := f.read(known.bank, raw[known.name]); err != nil {
			return nil, fmt.Errorf("signed boot states: %s%w", known.name, err)
		}
		delete(raw, known.name)
	}
	for name, list := range raw {
		var others []json.RawMessage
		if err := json.Unmarshal(list, &others); err != nil {
			return nil, fmt.Errorf("signed boot states: %s holds no list; want the name of a PCR bank and its states", clip(name))
		}
	}
	return f, nil
}

// read adds the states of one bank; list may be nil.
func (f *File) read(bank crypto.Hash, list json.RawMessage) error {
	if list == nil {
		return nil
	}
	var entries []entry
	if err := decode(list, &entries); err != nil {
		return fmt.Errorf(": %w", err)
	}
	for i, e := range entries {
		s, err := e.state(bank)
		if err != nil {
			return fmt.Errorf("[%d]: %w", i, err)
		}
		if err := f.add(s); err != nil {
			return fmt.Errorf(": %w", err)
		}
	}
	return nil
}

// decode refuses duplicate members, and names in another spelling.
func decode(b []byte, v any) error {
	strict, err := kjson.UnmarshalStrict(b, v, kjson.DisallowDuplicateFields)
	if err == nil && len(strict) > 0 {
		err = strict[0]
	}
	if err != nil {
		return fmt.Errorf("%s", clip(err.Error()))
	}
	return nil
}

func (e entry) state(bank crypto.Hash) (State, error) {
	s := State{Bank: bank, PCRs: slices.Sorted(slices.Values(e.PCRs)), What: e.What}
	fingerprint, err := hex.DecodeString(e.PKFP)
	if err != nil || len(fingerprint) != sha256.Size {
		return State{}, fmt.Errorf("pkfp is not a key's fingerprint; want %d bytes in hexadecimal", sha256.Size)
	}
	copy(s.KeyFingerprint[:], fingerprint)
	if s.Digest, err = hex.DecodeString(e.Pol); err != nil {
		return State{}, fmt.Errorf("pol is not hexadecimal; want the %d bytes of a TPM2_PolicyPCR digest", sha256.Size)
	}
	if s.Signature, err = base64.StdEncoding.Strict().DecodeString(e.Sig); err != nil {
		return State{}, fmt.Errorf("sig is not base64; want a signature over pol")
	}
	if s.Ref, err = hex.DecodeString(e.Ref); err != nil {
		return State{}, fmt.Errorf("ref is not hexadecimal; want a policyRef of at most %d bytes", MaxRef)
	}
	return s, s.check()
}

// New returns a file with these states, each once.
func New(states ...State) (*File, error) { return (&File{}).Merge(states...) }

// add appends a state unless the file has it already.
func (f *File) add(s State) error {
	if slices.ContainsFunc(f.states, s.equal) {
		return nil
	}
	if len(f.states) == MaxStates {
		return fmt.Errorf("more than %d signed boot states; remove those of kernels that are gone", MaxStates)
	}
	f.states = append(f.states, s)
	return nil
}

// Merge returns a file with f's states and the given ones, each once. If two differ
// only in their notes, it keeps the earlier one. f itself does not change.
func (f *File) Merge(states ...State) (*File, error) {
	merged := &File{states: slices.Clone(f.states)}
	for _, s := range states {
		if err := s.check(); err != nil {
			return nil, fmt.Errorf("boot state %s: %w", s, err)
		}
		if err := merged.add(s.clone()); err != nil {
			return nil, err
		}
	}
	return merged, nil
}

func (s State) clone() State {
	s.PCRs, s.Digest, s.Ref, s.Signature = slices.Clone(s.PCRs), bytes.Clone(s.Digest), bytes.Clone(s.Ref), bytes.Clone(s.Signature)
	return s
}

// Keep returns a file with the states of f for which keep is true.
func (f *File) Keep(keep func(State) bool) *File {
	kept := &File{}
	for _, s := range f.States() {
		if keep(s) {
			kept.states = append(kept.states, s)
		}
	}
	return kept
}

// States returns copies of the states, by bank, in the order of the file.
func (f *File) States() []State {
	all := make([]State, len(f.states))
	for i, s := range f.states {
		all[i] = s.clone()
	}
	slices.SortStableFunc(all, func(a, b State) int { return int(a.Bank) - int(b.Bank) })
	return all
}

// Select returns the states that claim to be signed by the key of that fingerprint with
// that policyRef. The caller must still verify them.
func (f *File) Select(fingerprint [sha256.Size]byte, ref []byte) []State {
	return f.Keep(func(s State) bool { return s.KeyFingerprint == fingerprint && bytes.Equal(s.Ref, ref) }).states
}

// Marshal returns the file as one line of JSON, without the parts that Parse skipped.
func (f *File) Marshal() ([]byte, error) {
	doc := struct {
		SHA256 []entry `json:"sha256,omitempty"`
		SHA384 []entry `json:"sha384,omitempty"`
	}{}
	for _, s := range f.states {
		e := entry{
			PCRs: s.PCRs, PKFP: hex.EncodeToString(s.KeyFingerprint[:]), Pol: hex.EncodeToString(s.Digest),
			Sig: base64.StdEncoding.EncodeToString(s.Signature), Ref: hex.EncodeToString(s.Ref), What: s.What,
		}
		if s.Bank == crypto.SHA384 {
			doc.SHA384 = append(doc.SHA384, e)
		} else {
			doc.SHA256 = append(doc.SHA256, e)
		}
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(doc); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
