#!/usr/bin/env bash
# An unmodified Flink 1.20 from Maven, in one process.
#   flink.sh URI FOLDER   counts the words of FOLDER/words into FOLDER/counts, and copies its lines into FOLDER/lines as a stream with checkpoints
set -euo pipefail
shopt -s inherit_errexit
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../maven.sh"
home=$(maven_home flink "$here")
java_options=(-Xmx1g -XX:-UsePerfData -Djava.net.preferIPv4Stack=true)
for package in java.lang java.util java.nio sun.nio.ch java.time java.net; do java_options+=(--add-opens "java.base/$package=ALL-UNNAMED"); done
uri=$1 folder=$2
exec java "${java_options[@]}" -cp "$home/classes:$home/lib/*" forebay.WordCount "$uri$folder/words" "$uri$folder/counts" "$uri$folder/lines" "$uri$folder/checkpoints"
