package bootpolicy

// Limits on the elements compared and the differences returned; nobody reads more.
const (
	maxAligned     = 256 // elements of either side; further ones are paired in their order
	maxDifferences = 1024
)

// pair is an element of a and the element of b that replaces it; -1 stands for none.
type pair struct{ a, b int }

// differences returns the replacements, removals and additions that turn the n elements of
// a into the m elements of b, in their order, or nothing if the two are equal. It strips
// the common head and tail, and finds a longest common subsequence of the rest.
func differences(n, m int, same func(a, b int) bool) []pair {
	head := 0
	for head < n && head < m && same(head, head) {
		head++
	}
	for n > head && m > head && same(n-1, m-1) {
		n, m = n-1, m-1
	}
	a, b := min(n-head, maxAligned), min(m-head, maxAligned)
	length := make([][]int, a+1) // of the longest common subsequence of the tails
	for i := range length {
		length[i] = make([]int, b+1)
	}
	for i := a - 1; i >= 0; i-- {
		for k := b - 1; k >= 0; k-- {
			length[i][k] = max(length[i+1][k], length[i][k+1])
			if same(head+i, head+k) {
				length[i][k] = max(length[i][k], length[i+1][k+1]+1)
			}
		}
	}
	var out []pair
	i, k := 0, 0
	for i < a && k < b {
		if same(head+i, head+k) && length[i][k] == length[i+1][k+1]+1 {
			i, k = i+1, k+1
			continue
		}
		switch {
		case length[i][k] == length[i+1][k+1]: // neither is needed: one replaces the other
			out = append(out, pair{head + i, head + k})
			i, k = i+1, k+1
		case length[i+1][k] >= length[i][k+1]:
			out = append(out, pair{head + i, -1})
			i++
		default:
			out = append(out, pair{-1, head + k})
			k++
		}
	}
	for i, k = head+i, head+k; (i < n || k < m) && len(out) < maxDifferences; i, k = i+1, k+1 {
		out = append(out, pair{orNone(i, n), orNone(k, m)})
	}
	return out
}

func orNone(i, n int) int {
	if i < n {
		return i
	}
	return -1
}
