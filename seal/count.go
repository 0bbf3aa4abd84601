package seal

import "fmt"

// Count returns a number of things, with the noun in the singular or the plural.
func Count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
