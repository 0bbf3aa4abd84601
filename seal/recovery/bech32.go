package recovery

const bech32Charset = "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"

// encodeIdentity writes the text of an X25519 identity to dst: the 32 bytes of key in
// upper-case Bech32 (BIP 173). age's own encoder returns a string, which can't be
// erased.
func encodeIdentity(dst, key []byte) {
	rest := dst[copy(dst, prefixX25519):]
	sum := bech32Prefix(prefixX25519[:len(prefixX25519)-1])
	put := func(value byte) {
		sum = bech32Step(sum, value)
		rest[0] = bech32Charset[value]
		rest = rest[1:]
	}
	acc, bits := uint32(0), 0
	for _, b := range key {
		acc, bits = acc<<8|uint32(b), bits+8
		for ; bits >= 5; bits -= 5 {
			put(byte(acc>>(bits-5)) & 31)
		}
	}
	if bits > 0 {
		put(byte(acc<<(5-bits)) & 31)
	}
	for range 6 {
		sum = bech32Step(sum, 0)
	}
	sum ^= 1
	for i := range 6 {
		rest[i] = bech32Charset[sum>>(5*(5-i))&31]
	}
}

// bech32Prefix returns the state of the checksum after the human-readable part, which
// enters the checksum in lower case.
func bech32Prefix(hrp string) uint32 {
	lower := make([]byte, len(hrp))
	for i := range hrp {
		lower[i] = hrp[i]
		if 'A' <= hrp[i] && hrp[i] <= 'Z' {
			lower[i] += 'a' - 'A'
		}
	}
	sum := uint32(1)
	for _, c := range lower {
		sum = bech32Step(sum, c>>5)
	}
	sum = bech32Step(sum, 0)
	for _, c := range lower {
		sum = bech32Step(sum, c&31)
	}
	return sum
}

func bech32Step(sum uint32, value byte) uint32 {
	top := sum >> 25
	sum = sum&0x1ffffff<<5 ^ uint32(value)
	for i, g := range [5]uint32{0x3b6a57b2, 0x26508e6d, 0x1ea119fa, 0x3d4233dd, 0x2a1462b3} {
		if top>>i&1 == 1 {
			sum ^= g
		}
	}
	return sum
}

const prefixX25519 = "AGE-SECRET-KEY-1"
