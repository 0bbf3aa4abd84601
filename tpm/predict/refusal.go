package predict

import "fmt"

func refuse(pcr int, format string, args ...any) error {
	hint := hintBefore
	if pcr == 7 {
		hint = hintAfter
	}
	return &Refusal{PCR: pcr, Reason: fmt.Sprintf(format, args...), Hint: hint}
}

// Refusal says why a boot cannot be predicted.
type Refusal struct {
	// PCR is the PCR that cannot be predicted; -1 if the refusal is not about one.
	PCR int
	// Reason says what Predict did not understand: lower case, no full stop.
	Reason string
	// Hint says what to do instead.
	Hint string
}

func (r *Refusal) Error() string {
	s := r.Reason
	if r.PCR >= 0 {
		s = fmt.Sprintf("PCR %d of the next boot cannot be predicted: %s", r.PCR, r.Reason)
	}
	return s + "; " + r.Hint
}

const hintBefore = "run kleidi suspend before the reboot"

// A suspension uses PCR 7.
const hintAfter = "boot the next boot with the recovery identity at hand: run kleidi recover after the reboot"
