package main
import ("testing";"context";"fmt";"os";"strings";"time";"strconv"
 "google.golang.org/grpc";"google.golang.org/grpc/credentials/insecure"; kmsapi "k8s.io/kms/apis/v2")
func ticks(pid string) int { b,_ := os.ReadFile("/proc/"+pid+"/stat"); f := strings.Fields(string(b)); u,_ := strconv.Atoi(f[13]); s,_ := strconv.Atoi(f[14]); fmt.Print(" u",u," s",s); return u+s }
func TestCPU(t *testing.T) {
 for r := 0; r < 3; r++ {
 for _, a := range strings.Split(os.Getenv("TARGETS"), ",") {
  p := strings.Split(a, "=")
  c, _ := grpc.NewClient("unix://"+p[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
  k := kmsapi.NewKeyManagementServiceClient(c)
  k.Status(context.Background(), &kmsapi.StatusRequest{})
  t0 := ticks(p[1]); s := time.Now()
  for i := 0; i < 20000; i++ { if _, err := k.Status(context.Background(), &kmsapi.StatusRequest{}); err != nil { t.Fatal(err) } }
  fmt.Println(p[0], (ticks(p[1])-t0)*10, "ms cpu", time.Since(s))
 }}
}
