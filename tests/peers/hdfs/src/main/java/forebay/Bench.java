package forebay;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataInputStream;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;

/**
 * Figures of the stock Java client on the file system at a URI, one JSON line each; run it on Forebay and on a real HDFS in turn. Started by hdfs.sh bench.
 *
 * <p>Arguments: -D options as the shell takes them, then the folder to work in and the MiB of the large file. Every figure is the best of some passes: the
 * first ones are Java's compiler's.
 */
public final class Bench {
  private static FileSystem fs;
  private static Path dir;

  private static void figure(String name, double value, String unit) {
    System.out.printf("{\"name\":\"%s\",\"value\":%.1f,\"unit\":\"%s\"}%n", name, value, unit);
  }

  private interface Work {
    void run(int i) throws Exception;
  }

  /** Calls per second of `count` calls by `threads`, the best of three passes. */
  private static double rate(int threads, int count, Work work) throws Exception {
    double best = 0;
    ExecutorService pool = Executors.newFixedThreadPool(threads);
    for (int pass = 0; pass < 3; pass++) {
      int of = pass;
      List<Callable<Void>> tasks = new ArrayList<>();
      for (int t = 0; t < threads; t++) {
        int first = t;
        tasks.add(() -> {
          for (int i = first; i < count; i += threads) {
            work.run(of * count + i);
          }
          return null;
        });
      }
      long began = System.nanoTime();
      for (Future<Void> f : pool.invokeAll(tasks)) {
        f.get();
      }
      best = Math.max(best, count / ((System.nanoTime() - began) / 1e9));
    }
    pool.shutdown();
    return best;
  }

  private static double read(Path file, int passes) throws Exception {
    byte[] piece = new byte[1 << 20];
    double best = 0;
    for (int pass = 0; pass < passes; pass++) {
      long began = System.nanoTime();
      long total = 0;
      try (FSDataInputStream in = fs.open(file)) {
        for (int n = in.read(piece); n >= 0; n = in.read(piece)) {
          total += n;
        }
      }
      best = Math.max(best, total / 1048576.0 / ((System.nanoTime() - began) / 1e9));
    }
    return best;
  }

  public static void main(String[] arguments) throws Exception {
    List<String> rest = new ArrayList<>(Arrays.asList(arguments));
    int mib = Integer.parseInt(rest.remove(rest.size() - 1));
    dir = new Path(rest.remove(rest.size() - 1));
    Configuration conf = new Configuration();
    for (String option : rest) {
      String[] pair = option.substring(2).split("=", 2);
      conf.set(pair[0], pair[1]);
    }
    fs = FileSystem.get(conf);
    fs.delete(dir, true);
    fs.mkdirs(dir);
    figure("create, 16 threads", rate(16, 400, i -> fs.create(new Path(dir, "c/" + i)).close()), "/s");
    figure("getFileInfo, 1 thread", rate(1, 3000, i -> fs.getFileStatus(new Path(dir, "c/" + i % 400))), "/s");
    figure("getFileInfo, 16 threads", rate(16, 20000, i -> fs.getFileStatus(new Path(dir, "c/" + i % 400))), "/s");
    figure("listing of 1,200", 1000 / rate(1, 20, i -> fs.listStatus(new Path(dir, "c"))), "ms");
    byte[] piece = new byte[1 << 20];
    Path file = new Path(dir, "large");
    double write = 0;
    for (int pass = 0; pass < 3; pass++) {
      long began = System.nanoTime();
      try (FSDataOutputStream out = fs.create(file, true)) {
        for (int i = 0; i < mib; i++) {
          Arrays.fill(piece, (byte) (i + pass));
          out.write(piece);
        }
      }
      write = Math.max(write, mib / ((System.nanoTime() - began) / 1e9));
    }
    figure("write, 1 replica", write, "MiB/s");
    figure("read", read(file, 5), "MiB/s");
    fs.delete(dir, true);
    Runtime.getRuntime().halt(0);
  }
}
