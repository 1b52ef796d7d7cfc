#!/usr/bin/env bash
# A real Kubernetes cluster on one machine, without images or downloads of releases: the upstream programs built from their modules, Debian's containerd and runc.
#   kube.sh helm                   builds helm and helm-docs once; prints their folder
#   kube.sh prepare                builds everything once (Go, a quarter of an hour on two cores); prints the folder
#   kube.sh built                  prints the folder where everything is built, else fails
#   kube.sh up DIR FAKE REAL       a cluster whose state is in DIR: FAKE simulated nodes (kwok) and REAL ones (kubelet, containerd); prints the command that runs in it
#   kube.sh image DIR FILE         loads a docker archive into the real nodes
#   kube.sh down DIR               stops what `up` started, by the ids it wrote down
# Everything runs in network namespaces of its own (NAME-hub, NAME-n1…); nothing in there reaches the machine's network. Needs root.
# Learned by running it, and why some of this is as it is: cgroup v1 needs failCgroupV1: false; without CAP_SYS_RESOURCE containerd needs restrict_oom_score_adj; kubelet
# would rewrite six sysctls of the whole machine, so it is shown files that say what it wants; `ip netns exec` hides /sys/fs/cgroup, so nsenter.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers/kube
export PATH=$PATH:/usr/local/go/bin
docs=v1.14.2 kwok=v0.8.0
key=$(cd "$here" && cat src/go.mod src/*/main.go | sha256sum | cut -c1-12)
bin=$cache/$key
hub=10.98.0.1 services=10.96.0.0/16 pods=10.244.0.0/16

need_go() { command -v go >/dev/null || { echo "the Kubernetes programs need Go 1.25 (apt-get install golang, or https://go.dev/dl)" >&2; exit 1; }; }

build() { # PROGRAM...
  local missing=() p
  for p in "$@"; do [ -x "$bin/$p" ] || missing+=("$p"); done
  [ "${#missing[@]}" -gt 0 ] || return 0
  need_go
  mkdir -p "$bin"
  exec 9>"$cache/lock"; flock 9
  local version; version=$(sed -n 's|^.*k8s.io/kubernetes v||p' "$here/src/go.mod" | head -1)
  local at=k8s.io/component-base/version tmp; tmp=$(mktemp -d "$cache/build.XXXX")
  local flags="-s -w -X $at.gitVersion=v$version -X $at.gitMajor=${version%%.*} -X $at.gitMinor=$(echo "$version" | cut -d. -f2) -X $at.gitTreeState=clean -X k8s.io/client-go/pkg/version.gitVersion=v$version"
  export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
  for p in "${missing[@]}"; do
    case $p in
      helm-docs) GOBIN=$tmp go install -trimpath -ldflags '-s -w' "github.com/norwoodj/helm-docs/cmd/helm-docs@$docs" >&2 ;;
      # Follows another release of Kubernetes, so it has modules of its own.
      kwok) GOBIN=$tmp go install -trimpath -ldflags '-s -w' "sigs.k8s.io/kwok/cmd/kwok@$kwok" >&2 ;;
      *) (cd "$here/src" && go build -trimpath -o "$tmp/$p" -ldflags "$flags" "./$p") >&2 ;;
    esac
    mv "$tmp/$p" "$bin/$p"
  done
  rmdir "$tmp"
  exec 9>&-
}

all=(kube helm dns pause kwok)

spawn() { # LOG NETNS COMMAND...: in the background, in that network namespace
  local log=$1 ns=$2; shift 2
  setsid nice -n 5 nsenter --net="/run/netns/$ns" "$@" >"$run/log/$log.log" 2>&1 </dev/null 9>&- &
  echo "$! $log" >>"$run/pids"
}

fail() { echo "kube.sh: $*" >&2; exit 1; }

up() {
  run=$1 fake=$2 real=$3
  [ "$(id -u)" = 0 ] || fail "needs root (network namespaces)"
  if [ "$real" -gt 0 ]; then
    local packages=()
    command -v containerd >/dev/null || packages+=(containerd)
    command -v runc >/dev/null || packages+=(runc)
    command -v nft >/dev/null || packages+=(nftables)
    command -v iptables >/dev/null || packages+=(iptables)
    [ -x /usr/lib/cni/bridge ] || packages+=(containernetworking-plugins)
    if [ "${#packages[@]}" -gt 0 ]; then
      apt-get -qq update >&2
      DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq install -y --no-install-recommends "${packages[@]}" >/dev/null
    fi
  fi
  build "${all[@]}"
  mkdir -p "$run/pki" "$run/log" "$run/path"
  name=fb$(printf '%s' "$run" | sha256sum | cut -c1-5)
  echo "$name" >"$run/name"
  : >"$run/pids"
  ln -sf "$bin/kube" "$bin/helm" "$run/path/"
  printf '#!/bin/sh\nexec "%s" kubectl "$@"\n' "$bin/kube" >"$run/path/kubectl"
  cat >"$run/exec" <<X
#!/bin/sh
# Runs a command where the cluster is reachable, with kubectl and helm in PATH.
export KUBECONFIG="$run/admin.kubeconfig" HELM_CACHE_HOME="$run/helm" HELM_CONFIG_HOME="$run/helm" HELM_DATA_HOME="$run/helm" PATH="$run/path:\$PATH"
exec nsenter --net=/run/netns/$name-hub "\$@"
X
  chmod +x "$run/exec" "$run/path/kubectl"
  local kubectl="$run/exec $run/path/kubectl"

  ip netns add "$name-hub"
  nsenter --net="/run/netns/$name-hub" sh -ec "ip link set lo up; ip link add kl0 type bridge; ip addr add $hub/24 dev kl0; ip link set kl0 up
    echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/all/send_redirects; echo 0 >/proc/sys/net/ipv4/conf/kl0/send_redirects
    ip route add default dev kl0 2>/dev/null || true"

  cd "$run/pki"
  local k; for k in ca srv; do openssl ecparam -name prime256v1 -genkey -noout -out $k.key 2>/dev/null; done
  openssl genrsa -out sa.key 2048 2>/dev/null
  openssl req -x509 -new -key ca.key -subj /CN=forebay-test-ca -days 3650 -out ca.crt 2>/dev/null
  openssl req -new -key srv.key -subj /CN=kube-apiserver 2>/dev/null | openssl x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out srv.crt \
    -extfile <(echo "subjectAltName=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1,IP:$hub,IP:10.96.0.1") 2>/dev/null
  kubeconfig "$run/admin.kubeconfig" admin system:masters
  local i; for i in $(seq "$real"); do kubeconfig "$run/node$i.kubeconfig" "system:node:node-$i" system:nodes; done

  spawn etcd "$name-hub" "$bin/kube" etcd --name e --data-dir "$run/etcd" --unsafe-no-fsync --log-level warn --listen-client-urls http://127.0.0.1:2379 \
    --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
    --initial-cluster e=http://127.0.0.1:2380
  spawn apiserver "$name-hub" "$bin/kube" apiserver --etcd-servers http://127.0.0.1:2379 --advertise-address "$hub" --secure-port 6443 \
    --service-cluster-ip-range "$services" --authorization-mode Node,RBAC --allow-privileged --token-auth-file "$run/pki/tokens.csv" \
    --tls-cert-file "$run/pki/srv.crt" --tls-private-key-file "$run/pki/srv.key" --service-account-issuer https://kubernetes.default.svc \
    --service-account-key-file "$run/pki/sa.key" --service-account-signing-key-file "$run/pki/sa.key" --enable-admission-plugins NodeRestriction \
    --kubelet-preferred-address-types InternalIP,Hostname
  for i in $(seq 1200); do $kubectl get --raw /readyz >/dev/null 2>&1 && break; sleep 0.1; [ "$i" = 1200 ] && fail "the API server is not ready: $run/log"; done
  spawn controller-manager "$name-hub" "$bin/kube" controller-manager --kubeconfig "$run/admin.kubeconfig" --use-service-account-credentials --leader-elect=false \
    --service-account-private-key-file "$run/pki/sa.key" --root-ca-file "$run/pki/ca.crt" --node-monitor-grace-period 20s
  spawn scheduler "$name-hub" "$bin/kube" scheduler --kubeconfig "$run/admin.kubeconfig" --leader-elect=false
  cat >"$run/Corefile" <<X
.:53 {
  bind $hub
  errors
  ready
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $run/admin.kubeconfig
    pods insecure
    ttl 2
  }
}
X
  spawn dns "$name-hub" "$bin/dns" -conf "$run/Corefile"
  [ "$fake" = 0 ] || simulated "$kubectl"
  for i in $(seq "$real"); do node "$kubectl" "$i"; done
  [ $((fake + real)) = 0 ] || $kubectl wait --for=condition=Ready node --all --timeout=180s >/dev/null 2>&1 || { $kubectl get nodes >&2; fail "the nodes are not ready: $run/log"; }
  for i in $(seq 100); do $kubectl -n default get sa default >/dev/null 2>&1 && break; sleep 0.1; done
  echo "$run/exec"
}

kubeconfig() { # FILE USER GROUP
  local token; token=$(openssl rand -hex 16)
  echo "$token,$2,$2,\"$3\"" >>"$run/pki/tokens.csv"
  cat >"$1" <<X
apiVersion: v1
kind: Config
current-context: forebay
clusters: [{name: forebay, cluster: {server: "https://$hub:6443", certificate-authority-data: $(base64 -w0 "$run/pki/ca.crt")}}]
contexts: [{name: forebay, context: {cluster: forebay, user: u}}]
users: [{name: u, user: {token: $token}}]
X
}

simulated() { # KUBECTL: nodes without anything behind them; their pods have loopback addresses, so that a test can call from these
  spawn kwok "$name-hub" "$bin/kwok" --kubeconfig "$run/admin.kubeconfig" --manage-all-nodes=false --manage-nodes-with-annotation-selector kwok.x-k8s.io/node=fake \
    --node-lease-duration-seconds 40 --config "$here/stages.yaml"
  local i
  for i in $(seq "$fake"); do
    cat <<X
---
apiVersion: v1
kind: Node
metadata:
  name: fake-$i
  annotations: {kwok.x-k8s.io/node: fake, node.alpha.kubernetes.io/ttl: "0"}
  labels: {kubernetes.io/hostname: fake-$i, kubernetes.io/os: linux, kubernetes.io/arch: amd64, type: kwok, topology.kubernetes.io/zone: zone-$((i % 3))}
spec: {podCIDR: 127.$((101 + i / 250)).$((i % 250)).0/24, podCIDRs: [127.$((101 + i / 250)).$((i % 250)).0/24]}
status:
  addresses: [{type: InternalIP, address: 10.99.$((i / 250)).$((i % 250 + 1))}, {type: Hostname, address: fake-$i}]
  allocatable: {cpu: "64", memory: 256Gi, pods: "250", ephemeral-storage: 1Ti}
  capacity: {cpu: "64", memory: 256Gi, pods: "250", ephemeral-storage: 1Ti}
X
  done >"$run/fake.yaml"
  $1 apply -f "$run/fake.yaml" >/dev/null
}

node() { # KUBECTL NUMBER: kubelet, containerd and kube-proxy in a network, mount and UTS namespace
  local kubectl=$1 i=$2 n=node-$2 ns=$name-n$2 ip=10.98.0.$((10 + $2)) cidr=10.244.$2.0/24 d=$run/n$2 k
  mkdir -p "$d/etc/cni"
  $kubectl apply -f - >/dev/null <<X
{apiVersion: v1, kind: Node, metadata: {name: $n, labels: {kubernetes.io/hostname: $n, topology.kubernetes.io/zone: zone-$((i % 2))}}, spec: {podCIDR: $cidr, podCIDRs: [$cidr]}}
X
  ip netns add "$ns"
  nsenter --net="/run/netns/$name-hub" sh -ec "ip link add v$i type veth peer name eth0 netns $ns; ip link set v$i master kl0 up; ip route add $cidr via $ip"
  nsenter --net="/run/netns/$ns" sh -ec "ip link set lo up; ip addr add $ip/24 dev eth0; ip link set eth0 up; ip route add default via $hub; echo 1 >/proc/sys/net/ipv4/ip_forward"
  echo "nameserver $hub" >"$d/etc/resolv.conf"
  cat >"$d/etc/cni/10-bridge.conflist" <<X
{"cniVersion": "0.4.0", "name": "kl", "plugins": [
 {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": {"type": "host-local", "ranges": [[{"subnet": "$cidr"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
 {"type": "portmap", "capabilities": {"portMappings": true}}]}
X
  cat >"$d/etc/containerd.toml" <<X
version = 2
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$d/etc/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
X
  cat >"$d/etc/kubelet.yaml" <<X
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /$name/$n
failCgroupV1: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: [$hub]
clusterDomain: cluster.local
resolvConf: $d/etc/resolv.conf
failSwapOn: false
enforceNodeAllocatable: []
evictionHard: {nodefs.available: "0%", imagefs.available: "0%", memory.available: 50Mi}
imageGCHighThresholdPercent: 100
fileCheckFrequency: 5s
syncFrequency: 10s
nodeStatusUpdateFrequency: 4s
shutdownGracePeriod: 0s
maxPods: 40
registerNode: true
X
  cat >"$d/etc/proxy.yaml" <<X
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: $n
clusterCIDR: $pods
clientConnection: {kubeconfig: $run/admin.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
X
  for k in cpu cpuacct cpuset memory devices freezer blkio pids systemd hugetlb; do
    [ -d "/sys/fs/cgroup/$k" ] || continue
    mkdir -p "/sys/fs/cgroup/$k/$name/$n"
    [ "$k" != cpuset ] || for q in "$name" "$name/$n"; do for f in cpus mems; do cat "/sys/fs/cgroup/cpuset/cpuset.$f" >"/sys/fs/cgroup/cpuset/$q/cpuset.$f"; done; done
  done
  cat >"$d/etc/enter" <<X
set -e
mount --make-rshared /
hostname $n
mount -t tmpfs run /run; mkdir -p /run/netns /run/containerd
for p in /var/lib/kubelet /var/lib/containerd /var/lib/cni /var/lib/forebay /var/log/pods /var/log/containers /mnt; do
  mkdir -p "$d/fs\$p" "\$p"; mount --bind "$d/fs\$p" "\$p"
done
mount -t tmpfs shm /dev/shm
for kv in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  f=$d/etc/sysctl-\$(echo "\${kv%=*}" | tr / -); echo "\${kv#*=}" >"\$f"; mount --bind "\$f" "/proc/sys/\${kv%=*}"
done
echo \$\$ >$d/pid
exec sleep infinity
X
  spawn "n$i-namespaces" "$ns" unshare -m -u --propagation private sh "$d/etc/enter"
  for k in $(seq 200); do [ -s "$d/pid" ] && break; sleep 0.05; done
  inside "$i" "n$i-containerd" containerd --config "$d/etc/containerd.toml"
  for k in $(seq 300); do nsenter -t "$(cat "$d/pid")" -m -u -n ctr version >/dev/null 2>&1 && break; sleep 0.1; done
  [ -s "$cache/pause.tar" ] || python3 "$here/../../../helm/archive.py" "$cache/pause.tar" localhost/pause:1 "$bin/pause=/pause" -- /pause
  load "$i" "$cache/pause.tar"
  inside "$i" "n$i-kubelet" "$bin/kube" kubelet --config "$d/etc/kubelet.yaml" --kubeconfig "$run/node$i.kubeconfig" --hostname-override "$n" --node-ip "$ip" \
    --root-dir /var/lib/kubelet --cert-dir "$d/etc/pki"
  inside "$i" "n$i-proxy" "$bin/kube" proxy --config "$d/etc/proxy.yaml"
}

inside() { # NUMBER LOG COMMAND...: in the background, in a node's namespaces
  local i=$1 log=$2; shift 2
  setsid nice -n 5 nsenter -t "$(cat "$run/n$i/pid")" -m -u -n "$@" >"$run/log/$log.log" 2>&1 </dev/null 9>&- &
  echo "$! $log" >>"$run/pids"
}

load() { # NUMBER ARCHIVE
  nsenter -t "$(cat "$run/n$1/pid")" -m -n ctr -n k8s.io images import - <"$2" >/dev/null
}

image() {
  run=$1
  local d; for d in "$run"/n[0-9]*; do [ ! -s "$d/pid" ] || load "${d##*/n}" "$2"; done
}

down() {
  run=$1
  [ -s "$run/name" ] || return 0
  name=$(cat "$run/name")
  stop() { # PATTERN SIGNAL
    tac "$run/pids" 2>/dev/null | while read -r pid n; do
      # shellcheck disable=SC2254
      case $n in $1) kill "-$2" -- "-$pid" 2>/dev/null || kill "-$2" "$pid" 2>/dev/null || true ;; esac
    done
  }
  stop '*-kubelet' TERM; stop '*-proxy' TERM; sleep 0.3
  # Pods are found by the cgroups of this cluster, their shims by the mount namespace of their node.
  local f p d me
  for f in $(find /sys/fs/cgroup/*/"$name" -name cgroup.procs 2>/dev/null); do
    # Some are gone by the time they are looked at.
    for p in $(cat "$f" 2>/dev/null || true); do kill -KILL "$p" 2>/dev/null || true; done
  done
  for d in "$run"/n[0-9]*; do
    [ -s "$d/pid" ] || continue
    me=$(readlink "/proc/$(cat "$d/pid")/ns/mnt" 2>/dev/null) || continue
    for p in /proc/[0-9]*; do
      if [ "$(readlink "$p/ns/mnt" 2>/dev/null)" = "$me" ] && [ "${p#/proc/}" != "$(cat "$d/pid")" ]; then kill -KILL "${p#/proc/}" 2>/dev/null || true; fi
    done
  done
  stop '*' TERM; sleep 0.5; stop '*' KILL
  for p in $(ip netns list | awk '{print $1}' | grep -E "^$name-(hub|n[0-9]+)$"); do ip netns del "$p"; done
  sleep 0.2
  find /sys/fs/cgroup/*/"$name" -depth -type d -exec rmdir {} + 2>/dev/null || true
  rm -f "$run/name"
}

case "${1:-}" in
  helm) build helm helm-docs; echo "$bin" ;;
  prepare) build "${all[@]}" helm-docs; echo "$bin" ;;
  built) for p in "${all[@]}"; do [ -x "$bin/$p" ] || exit 1; done; echo "$bin" ;;
  up) up "$2" "$3" "$4" ;;
  image) image "$2" "$3" ;;
  down) down "$2" ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
