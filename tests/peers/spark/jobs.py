"""Jobs of an unmodified Spark: word count, the formats written, appended, overwritten and partitioned, read back and compared. Started by spark.sh."""

import collections
import os
import sys

from pyspark.sql import SparkSession

ROWS = 200_000
SUM = "sum(cast(id as bigint) + cast(k as bigint))"
FORMATS = ["parquet", "orc", "json", "csv"]


def commit(spark, to):
    """One job of many tasks, committed by rename; says so when it is over. What is killed meanwhile is the caller's affair."""
    rows = spark.range(0, ROWS, 1, 40).selectExpr("id", "id % 7 as k")
    try:
        rows.write.mode("overwrite").parquet(to)
    except Exception as e:  # The job failed, and says why.
        print("failed: " + str(e).split("\n")[0])
        return
    print("committed")


def main(uri, folder, settings):
    builder = SparkSession.builder.master("local[2]").config("spark.hadoop.fs.defaultFS", uri)
    for setting in settings:
        key, value = setting.split("=", 1)
        builder = builder.config(key, value)
    spark = builder.config("spark.ui.enabled", "false").config("spark.sql.shuffle.partitions", "4").getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    jvm, conf = spark.sparkContext._jvm, spark.sparkContext._jsc.hadoopConfiguration()
    path = jvm.org.apache.hadoop.fs.Path
    fs = jvm.org.apache.hadoop.fs.FileSystem.get(conf)

    if "COMMIT" in os.environ:
        for to in os.environ["COMMIT"].split(","):
            commit(spark, to)
        if "CHECK" not in os.environ:
            return
    if "CHECK" in os.environ:
        for to in os.environ["CHECK"].split(","):
            there = fs.exists(path(to + "/_SUCCESS"))
            print("%s %s %d" % (to, there, spark.read.parquet(to).count() if there else 0))
        return
    text = os.path.join(folder, "words")
    fs.copyFromLocalFile(path("file://" + text), path("/words"))
    counted = spark.sparkContext.textFile("/words").flatMap(str.split).map(lambda w: (w, 1)).reduceByKey(lambda a, b: a + b).collect()
    with open(text) as words:
        assert dict(counted) == dict(collections.Counter(words.read().split())), "word count"
    spark.sparkContext.textFile("/words").saveAsTextFile("/text")
    assert spark.sparkContext.textFile("/text").count() == spark.sparkContext.textFile("/words").count()
    print("word count: %d words" % len(counted))

    rows = spark.range(0, ROWS).selectExpr("id", "id % 7 as k", "cast(id as string) as t", "id * 0.5 as r")
    total = rows.selectExpr(SUM).first()[0]
    for name in FORMATS:
        def write(what, mode, to, by=()):
            writer = what.write.format(name).mode(mode)
            (writer.option("header", "true") if name == "csv" else writer).partitionBy(*by).save(to)

        def read(at):
            return spark.read.format(name).option("header", "true").load(at)

        write(rows, "overwrite", "/o/" + name)
        write(rows.limit(10), "append", "/o/" + name)
        assert read("/o/" + name).count() == ROWS + 10, name
        write(rows, "overwrite", "/o/" + name)
        assert read("/o/" + name).selectExpr(SUM).first()[0] == total, name
        write(rows, "overwrite", "/p/" + name, ["k"])
        parts = sorted(str(s.getPath().getName()) for s in fs.listStatus(path("/p/" + name)) if s.isDirectory())
        assert parts == ["k=%d" % k for k in range(7)], parts
        assert read("/p/" + name).groupBy("k").count().count() == 7, name
        print(name + ": written, appended, overwritten, partitioned, read back")

    # Where Spark means to run what reads a file: the hosts that hold its blocks.
    rdd = spark.sparkContext._jsc.textFile("/words").rdd().dependencies().head().rdd()
    print("preferred: " + rdd.preferredLocations(rdd.partitions()[0]).mkString(","))
    print("done")


main(sys.argv[1], sys.argv[2], sys.argv[3:])
