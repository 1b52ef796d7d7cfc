package forebay;

import org.apache.flink.api.common.RuntimeExecutionMode;
import org.apache.flink.api.common.eventtime.WatermarkStrategy;
import org.apache.flink.api.common.serialization.SimpleStringEncoder;
import org.apache.flink.api.common.typeinfo.Types;
import org.apache.flink.api.java.tuple.Tuple2;
import org.apache.flink.connector.file.sink.FileSink;
import org.apache.flink.connector.file.src.FileSource;
import org.apache.flink.connector.file.src.reader.TextLineInputFormat;
import org.apache.flink.core.fs.Path;
import org.apache.flink.streaming.api.environment.StreamExecutionEnvironment;
import org.apache.flink.util.Collector;

/**
 * Counts words of a file, in one process, and writes them as a batch; then copies its lines as a stream with checkpoints, whose sink goes on with files that are
 * not finished (flush, truncate, rename). Arguments: input, output of the batch, output of the stream, checkpoints. Started by flink.sh.
 */
public final class WordCount {
  public static void main(String[] arguments) throws Exception {
    StreamExecutionEnvironment batch = StreamExecutionEnvironment.createLocalEnvironment(2);
    batch.setRuntimeMode(RuntimeExecutionMode.BATCH);
    batch.fromSource(FileSource.forRecordStreamFormat(new TextLineInputFormat(), new Path(arguments[0])).build(), WatermarkStrategy.noWatermarks(), "words")
        .flatMap((String line, Collector<Tuple2<String, Integer>> out) -> {
          for (String word : line.split("\\s+")) {
            if (!word.isEmpty()) {
              out.collect(Tuple2.of(word, 1));
            }
          }
        }).returns(Types.TUPLE(Types.STRING, Types.INT))
        .keyBy(word -> word.f0).sum(1)
        .map(word -> word.f0 + "\t" + word.f1)
        .sinkTo(FileSink.forRowFormat(new Path(arguments[1]), new SimpleStringEncoder<String>("UTF-8")).build());
    batch.execute("count");

    StreamExecutionEnvironment stream = StreamExecutionEnvironment.createLocalEnvironment(2);
    stream.enableCheckpointing(200);
    stream.getCheckpointConfig().setCheckpointStorage(arguments[3]);
    stream.fromSource(FileSource.forRecordStreamFormat(new TextLineInputFormat(), new Path(arguments[0])).build(), WatermarkStrategy.noWatermarks(), "lines")
        .map(line -> {
          // Long enough for some checkpoints.
          Thread.sleep(5);
          return line;
        })
        .sinkTo(FileSink.forRowFormat(new Path(arguments[2]), new SimpleStringEncoder<String>("UTF-8")).build());
    stream.execute("copy");
    System.out.println("done");
    System.exit(0);
  }
}
