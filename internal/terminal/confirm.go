package terminal

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
)

// Ask asks a person at a terminal, and returns the line that they type. Elsewhere it reads
// nothing, and returns false: an answer from a pipe is no answer.
func (i Input) Ask(question string) (answer string, asked bool, err error) {
	in, ok := i.In.(*os.File)
	if !ok || !Is(in) {
		return "", false, nil
	}
	fmt.Fprint(i.Err, question)
	line, err := ReadLine(in)
	return strings.TrimSpace(string(line)), true, err
}

// ConfirmNode asks for the name of a node, unless it was given. how says how to confirm
// without a terminal.
func (i Input) ConfirmNode(name, given, how string) error {
	asked := false
	if given == "" {
		var err error
		if given, asked, err = i.Ask("type the name of the node (" + name + ") to go on: "); err != nil {
			return err
		}
	}
	switch given {
	case name:
		return nil
	case "":
		if asked {
			return errors.New("not confirmed")
		}
		return seal.Errorf("", how, "not confirmed, because there is no terminal to ask at")
	}
	return fmt.Errorf("%q is not the name of the node, which is %s", given, name)
}
