#!/usr/bin/env bash
# A real HDFS (NameNode and DataNodes in one JVM, Hadoop's jars from Maven) for tests, and Hadoop's own shell to check with.
#   hdfs.sh prepare                       installs, downloads and compiles what is missing; its folder is the last line
#   hdfs.sh run dir=FOLDER [key=value ..] the server, in the foreground; prints `READY hdfs://127.0.0.1:PORT http=.. dn=..`
#   hdfs.sh shell -Dfs.defaultFS=URI -ls /   `hdfs dfs`; HADOOP_CONF_DIR and HADOOP_USER_NAME work as they do there
#   hdfs.sh commands -Dfs.defaultFS=URI .. FILE   many commands in one process, one a line, words parted by tabs: see Commands.java
#   hdfs.sh bench -Dfs.defaultFS=URI .. FOLDER MIB   figures of the Java client on a file system, with -Dforebay.bench.pids=PID,.. the server's
#                                                    processor time beside each: see Bench.java
# Keys of run, besides dir (where all its data are):
#   format=false   go on with what is in dir, on the same ports (default true: dir is emptied of an earlier file system)
#   n=1            DataNodes; as many replicas by default, at most 3 (of the shell's files 1, unless -Ddfs.replication=N)
#   perms=true     permissions are checked; who starts it is superuser
#   nn http dn dnhttp dnipc   ports of the NameNode and of the first DataNode (the next have 10 more); 0 is any free one
#   some.key=..    any key with a dot is Hadoop's own
# SIGTERM and kill -9 end it alike, and at once.
set -euo pipefail
shopt -s inherit_errexit
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers/hdfs

# Debian packages; nothing is installed where they are there already.
install_missing() {
  local missing=()
  command -v java >/dev/null && command -v javac >/dev/null || missing+=(openjdk-17-jdk-headless)
  command -v mvn >/dev/null || missing+=(maven)
  [ "${#missing[@]}" -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || { echo "install first: ${missing[*]}" >&2; exit 1; }
  echo "installing ${missing[*]}" >&2
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
}

# Prints the folder of this pom and these sources. Called in $(..): the lock must not be inherited by what runs later.
prepare() {
  local key home tmp
  key=$(cd "$here" && { cat pom.xml; find src -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum | cut -c1-12)
  home=$cache/$key
  if [ ! -d "$home" ] || ! command -v java >/dev/null; then
    mkdir -p "$cache"
    exec 9>"$cache/lock"; flock 9
    install_missing
    if [ ! -d "$home" ]; then
      # Under the lock, whatever is there unfinished was left by a build that was killed.
      rm -rf "$cache"/build.*
      tmp=$(mktemp -d "$cache/build.XXXX")
      mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$tmp/lib" >&2
      javac -nowarn -cp "$tmp/lib/*" -d "$tmp/classes" "$here"/src/main/java/forebay/*.java >&2
      cp "$here"/src/main/resources/* "$tmp/classes"
      # libhadoop.so, which the Java client passes descriptors with: Apache publishes none, this jar carries one of 3.3.5.
      mvn -q -B org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy -Dartifact=io.trino.hadoop:hadoop-apache:3.3.5-3:jar -DoutputDirectory="$tmp/native" >&2
      (cd "$tmp/native" && jar xf hadoop-apache-3.3.5-3.jar "nativelib/Linux-$(dpkg --print-architecture | sed 's/arm64/aarch64/')" && mv nativelib/*/libhadoop.so . && rm -rf nativelib ./*.jar)
      chmod 755 "$tmp"
      mv -T "$tmp" "$home"
    fi
  fi
  echo "$home"
}

# Hadoop looks into classes that Java 17 hides. The C1 compiler alone starts faster, which is what a test waits for.
java_options=(-Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData -Djava.net.preferIPv4Stack=true)
for package in java.lang java.util java.nio sun.nio.ch; do java_options+=(--add-opens "java.base/$package=ALL-UNNAMED"); done

command=${1:-help}
shift || true
case $command in
  prepare)
    prepare ;;
  run)
    home=$(prepare)
    exec java "${java_options[@]}" -Dforebay.log=INFO -cp "$home/classes:$home/lib/*" forebay.HdfsServer "$@" ;;
  shell)
    home=$(prepare)
    exec java "${java_options[@]}" -cp "${HADOOP_CONF_DIR:+$HADOOP_CONF_DIR:}$home/classes:$home/lib/*" org.apache.hadoop.fs.FsShell "$@" ;;
  commands | bench)
    home=$(prepare)
    main=forebay.Commands
    # For figures Java's better compiler.
    [ "$command" = commands ] || { main=forebay.Bench; java_options=("${java_options[@]/-XX:TieredStopAtLevel=1/-XX:+TieredCompilation}"); }
    exec java "${java_options[@]}" -Djava.library.path="$home/native" -cp "${HADOOP_CONF_DIR:+$HADOOP_CONF_DIR:}$home/classes:$home/lib/*" "$main" "$@" ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    [ "$command" = help ] || exit 2 ;;
esac
