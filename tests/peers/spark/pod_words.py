"""pod_words.py URI: the driver, in a pod: counts the words of each file with two executors in pods, and prints where Spark says that its tasks ran."""
import collections, glob, json, sys, time
from pyspark.sql import SparkSession

uri = sys.argv[1]
session = SparkSession.builder.appName("words").getOrCreate()
context = session.sparkContext
# Locations are asked for when files are planned: the executors have to be there by then.
end = time.time() + 120
while context._jsc.sc().getExecutorMemoryStatus().size() < 3 and time.time() < end:
    time.sleep(0.2)
# Reading once brings what is not cached to where the executors are.
for _ in range(2):
    words = session.read.text(uri).rdd.flatMap(lambda row: row[0].split()).count()
print("words:", words, flush=True)
session.stop()
levels = collections.Counter()
for log in glob.glob("/tmp/events/*"):
    for line in open(log):
        event = json.loads(line)
        if event["Event"] == "SparkListenerTaskEnd" and event["Task Type"] == "ResultTask":
            levels[event["Task Info"]["Locality"]] += 1
print("levels:", json.dumps(levels), flush=True)
