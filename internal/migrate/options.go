package migrate

// The ways to migrate.
const (
	// ByAPI leaves the work to StorageVersionMigration.
	ByAPI = "api"
	// ByPatch patches each object.
	ByPatch = "patch"
)

// Options say what to migrate, and how.
type Options struct {
	// Resources are as in an EncryptionConfiguration: secrets, or *.stable.example.com.
	Resources []string
	// SkipUnserved leaves out resources that the API does not serve.
	SkipUnserved bool
	// By is ByAPI or ByPatch. If it is empty, the API is used if the cluster serves it.
	By string
	// Workers patch side by side, all of them together at most Rate objects per second.
	Workers int
	Rate    float64
	// DryRun changes nothing. By patch it counts the objects.
	DryRun bool
	// Progress is told after each object.
	Progress func(resource string, done int)
	// Waiting is told why nothing happens, if kube-controller-manager does not begin soon.
	Waiting func(message string)
}

// Result describes the migration.
type Result struct {
	DryRun    bool       `json:"dryRun,omitempty"`
	By        string     `json:"by"`
	Resources []Migrated `json:"resources"`
	// Unserved are resources that the API does not serve.
	Unserved []string `json:"unserved,omitempty"`
	// ClusterRole is the role, as YAML, that the kubeconfig's user needs.
	ClusterRole string `json:"clusterRole,omitempty"`
}

// Migrated is the result for one resource.
type Migrated struct {
	Name string `json:"name"`
	// Objects is missing if the API does the work, because it does not count them.
	Objects int `json:"objects,omitempty"`
	// Conflicts counts the retries of objects that somebody else wrote at the same time.
	// Gone counts the objects that were deleted. Refused counts those that the API does not
	// write again, for instance because of an admission policy.
	Conflicts int `json:"conflicts,omitempty"`
	Gone      int `json:"gone,omitempty"`
	Refused   int `json:"refused,omitempty"`
}

const hintAgain = "run kleidi migrate again: objects under the current key are not written again"
