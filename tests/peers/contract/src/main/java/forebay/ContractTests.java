package forebay;

import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.Options;
import org.apache.hadoop.fs.contract.AbstractContractContentSummaryTest;
import org.apache.hadoop.fs.contract.AbstractContractCopyFromLocalTest;
import org.apache.hadoop.fs.contract.AbstractContractEtagTest;
import org.apache.hadoop.fs.contract.AbstractContractGetEnclosingRoot;
import org.apache.hadoop.fs.contract.AbstractContractStreamIOStatisticsTest;
import org.apache.hadoop.fs.contract.AbstractFSContract;
import org.apache.hadoop.fs.contract.hdfs.TestDFSWrappedIO;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractAppend;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractBulkDelete;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractConcat;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractCreate;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractDelete;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractGetFileStatus;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractLeaseRecovery;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractMkdir;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractMultipartUploader;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractOpen;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractPathHandle;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractRename;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractRootDirectory;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractSafeMode;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractSeek;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractSetTimes;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractUnbuffer;
import org.apache.hadoop.fs.contract.hdfs.TestHDFSContractVectoredRead;
import org.junit.AfterClass;
import org.junit.BeforeClass;

/**
 * Hadoop's own contract tests with {@link RemoteHdfsContract}. Where Hadoop has a class for HDFS that one is taken, less its
 * cluster (a static method hides the one it inherits); the others are those Hadoop does not run on HDFS.
 */
final class ContractTests {
  private static final int TIMEOUT = 1000 * Integer.getInteger("contract.timeout", 120);

  /** In this order: the last one empties the root folder. */
  static final Class<?>[] ALL = {
    Append.class, BulkDelete.class, Concat.class, Create.class, Delete.class, GetFileStatus.class, LeaseRecovery.class,
    Mkdir.class, MultipartUploader.class, Open.class, PathHandle.class, Rename.class, SafeMode.class, Seek.class,
    SetTimes.class, Unbuffer.class, VectoredRead.class, ContentSummary.class, CopyFromLocal.class, Etag.class,
    GetEnclosingRoot.class, StreamIOStatistics.class, WrappedIO.class, RootDirectory.class,
  };

  private ContractTests() {
  }

  public static class Append extends TestHDFSContractAppend {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class BulkDelete extends TestHDFSContractBulkDelete {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Concat extends TestHDFSContractConcat {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Create extends TestHDFSContractCreate {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Delete extends TestHDFSContractDelete {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class GetFileStatus extends TestHDFSContractGetFileStatus {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class LeaseRecovery extends TestHDFSContractLeaseRecovery {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Mkdir extends TestHDFSContractMkdir {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class MultipartUploader extends TestHDFSContractMultipartUploader {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Open extends TestHDFSContractOpen {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class PathHandle extends TestHDFSContractPathHandle {
    public PathHandle(String name, Options.HandleOpt[] options, boolean serialized) {
      super(name, options, serialized);
    }

    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Rename extends TestHDFSContractRename {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class SafeMode extends TestHDFSContractSafeMode {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Seek extends TestHDFSContractSeek {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class SetTimes extends TestHDFSContractSetTimes {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Unbuffer extends TestHDFSContractUnbuffer {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class VectoredRead extends TestHDFSContractVectoredRead {
    public VectoredRead(String bufferType) {
      super(bufferType);
    }

    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class ContentSummary extends AbstractContractContentSummaryTest {
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class CopyFromLocal extends AbstractContractCopyFromLocalTest {
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class Etag extends AbstractContractEtagTest {
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class GetEnclosingRoot extends AbstractContractGetEnclosingRoot {
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class StreamIOStatistics extends AbstractContractStreamIOStatisticsTest {
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class WrappedIO extends TestDFSWrappedIO {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }

  public static class RootDirectory extends TestHDFSContractRootDirectory {
    @BeforeClass public static void createCluster() { }
    @AfterClass public static void teardownCluster() { }
    @Override protected AbstractFSContract createContract(Configuration conf) { return new RemoteHdfsContract(conf); }
    @Override protected int getTestTimeoutMillis() { return TIMEOUT; }
  }
}
