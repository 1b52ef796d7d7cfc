# Sourced by the scripts of peers that are jars from Maven.
#   maven_home NAME FOLDER   the folder of a peer's jars (lib) and, where FOLDER has src/, of its classes; made once for each state of FOLDER's pom.xml and src/.
#                            Called in $(..): the lock must not be inherited by what runs later.
maven_home() {
  local name=$1 here=$2 cache key home tmp
  # Installs Java and Maven where they are missing.
  bash "$here/../hdfs/hdfs.sh" prepare >/dev/null
  cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers/$name
  key=$(cd "$here" && { cat pom.xml; [ ! -d src ] || find src -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum | cut -c1-12)
  home=$cache/$key
  if [ ! -d "$home" ]; then
    mkdir -p "$cache"
    exec 9>"$cache/lock"; flock 9
    if [ ! -d "$home" ]; then
      # Under the lock, whatever is there unfinished was left by a build that was killed.
      rm -rf "$cache"/build.*
      tmp=$(mktemp -d "$cache/build.XXXX")
      mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$tmp/lib" >&2
      [ ! -d "$here/src" ] || find "$here/src" -name '*.java' -print0 | xargs -0 javac -nowarn -cp "$tmp/lib/*" -d "$tmp/classes" >&2
      chmod 755 "$tmp"
      mv -T "$tmp" "$home"
    fi
  fi
  echo "$home"
}
