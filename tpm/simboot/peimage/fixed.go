package peimage

import (
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"math/big"
)

// fixedPrimes make the key of [FixedSigner]. The key is public and protects nothing.
var fixedPrimes = []string{
	"d85b10e59fe64b56e93a3d9b2a978ee8234ec8d120b02f4cccbffc1a1c846de1bba68c7dbbc7d154ac212c4f14fc07c66bc5cddab614b9dcf0c962aeb64cc8a5" +
		"459fc5aeacc03a2fb69ef8c748cd5b9c0ca3901542bf46d778863a706596b20ff6fb57eb575992cb9a1f9ad041e32cb858fdc754341eb5de3f4304d54bc0b487",
	"c6b89bd0c47af216c7d09ae7c593521a518a5561fa05da5d4d5a94be3e0ebbac6d1faf6d5e296ba012362fbd34fa7b6a4297c4b021ff9eb45f72cd78adcdb0bf" +
		"20c543b0b38695671d0029a9bb40ba3e2ddd7121593ffa5b7151298ede4645f9d3c23ccfa1c2c1427f60eb292e8556807a8a8ccd641f77c802ec1352d50bbdc5",
}

// FixedSigner returns a signer with a self-signed certificate. Both follow from the
// name alone, so simulated machines can hold the certificate in their db and find it
// there at each boot. All names have the same key.
func FixedSigner(name string) (*Signer, error) {
	key := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: big.NewInt(1), E: 65537}}
	phi := big.NewInt(1)
	for _, s := range fixedPrimes {
		p, ok := new(big.Int).SetString(s, 16)
		if !ok {
			return nil, errors.New("malformed prime")
		}
		key.Primes = append(key.Primes, p)
		key.N.Mul(key.N, p)
		phi.Mul(phi, new(big.Int).Sub(p, big.NewInt(1)))
	}
	key.D = new(big.Int).ModInverse(big.NewInt(int64(key.E)), phi)
	key.Precompute()
	if err := key.Validate(); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(name))
	return certify(name, new(big.Int).SetBytes(sum[:8]), key, nil)
}
